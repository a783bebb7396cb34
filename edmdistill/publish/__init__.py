"""Publishing to the Hugging Face Hub: cards and uploads."""
