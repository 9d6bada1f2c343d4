"""Writes slurm/*.sbatch from the recipes and the profile generic-v100; run it after either has changed."""

from __future__ import annotations

from pixart_ds import files
from pixart_ds.cluster.jobs import JobSpec
from pixart_ds.config.load import load_chain
from pixart_ds.config.profile import load_profile, slurm_folder


def main() -> None:
    profile = load_profile("generic-v100")
    for stage in load_chain("chain").stages:
        path = slurm_folder() / f"{stage.name}.sbatch"
        files.write_text(path, JobSpec(stage, profile).render())
        print(path)


if __name__ == "__main__":
    main()
