"""LoRA adapters in PEFT's format: opened, checked against a model, given a slot, merged."""
