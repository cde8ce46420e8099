"""The dataset types, axolotl's config of an iteration, and what is checked before and after training."""
