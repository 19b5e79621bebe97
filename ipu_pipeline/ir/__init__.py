"""Plain data that every layer speaks: graph, machine, schedule, plan. No torch in here."""
