"""Every model class of transformers: captured, planned, trained one step, compared with eager."""
