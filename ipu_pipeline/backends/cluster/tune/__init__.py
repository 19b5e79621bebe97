"""The search over every parallel size, schedule and way to save memory."""
