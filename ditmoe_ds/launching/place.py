"""What a host offers, as one JSON line: ``python -m ditmoe_ds.launching.place``."""

import json
import os
import subprocess

import torch

import ditmoe_ds


def main() -> None:
    gpus = torch.cuda.device_count()
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    offer = dict(devices=gpus or os.cpu_count(), kind="GPUs" if gpus else "CPU cores", address=addresses[0], version=ditmoe_ds.__version__)
    print(json.dumps(offer))


if __name__ == "__main__":
    main()
