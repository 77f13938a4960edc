"""How sensitive is the gate? Seeded faults through the real engine, judged by our checks and by peers' rules."""
