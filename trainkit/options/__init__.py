"""The flags that several scripts share, one dataclass per group of `--help`.

Flags of diffusers' `train_unconditional.py` keep their name and meaning. Steps are optimizer steps everywhere.
"""
