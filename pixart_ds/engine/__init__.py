"""Everything that touches DeepSpeed and the ranks' process group: world, engine, checkpoints, handover."""
