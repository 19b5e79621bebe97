"""From blocks and prices to a plan: options, search, schedules, passes, reports."""
