# SPDX-License-Identifier: Apache-2.0
"""The reproduction as a pipeline: stages, jobs and the two engines (Snakemake, DVC) that run them."""
