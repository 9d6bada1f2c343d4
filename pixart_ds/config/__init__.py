"""Recipes: closed, frozen, typed. `schema` says what may be said, `load` reads it, `deepspeed` merges DeepSpeed's file."""
