"""Prices of what a rank of GPUs computes, holds and sends."""
