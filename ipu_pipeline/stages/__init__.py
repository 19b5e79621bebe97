"""What backends share to run stages."""
