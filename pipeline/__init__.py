"""The reproduction as a pipeline: stages, jobs and the two engines (Snakemake, DVC) that run them."""
