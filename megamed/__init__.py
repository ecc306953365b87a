"""megamed: pretraining and fine-tuning of medical vision-language models on Megatron-core."""

__version__ = "0.1.0"
