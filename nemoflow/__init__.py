"""nemoflow: the library that the rules and scripts share. It imports no Snakemake."""

__version__ = "0.1.0"
