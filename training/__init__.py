"""What makes a run of epochs: one epoch, where a run stands, how it is saved, restored and stopped."""
