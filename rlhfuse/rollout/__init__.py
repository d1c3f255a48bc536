"""Generation and early inference: scheduler, simulator, live loop."""
