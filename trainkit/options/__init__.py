"""The flags that several scripts share, a dataclass for each room of `--help`.

Flags that diffusers' `train_unconditional.py` has keep its name and meaning. Steps are optimizer steps everywhere.
"""
