"""glimt runs the GLM vision-language models from their original checkpoints."""
