"""Where a plan runs: one folder a backend, each pricing, constraining and running its stages."""
