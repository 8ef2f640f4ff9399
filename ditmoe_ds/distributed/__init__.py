import ditmoe_ds.moe  # noqa: F401 (settles DeepSpeed's accelerator before it is imported here)
