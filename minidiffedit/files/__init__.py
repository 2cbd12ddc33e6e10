"""What is read and written: pictures, masks, metadata, checkpoints' configs, the hub, saved states."""
