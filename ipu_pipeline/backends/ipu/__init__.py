"""Plans for Graphcore IPUs: run by a worker under the SDK's Python, or as a bundle."""
