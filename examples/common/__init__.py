"""What the scripts beside this folder share: options, flow, models, reports."""
