"""What a step would take on a cluster that is not there: prediction and planning, no GPU."""
