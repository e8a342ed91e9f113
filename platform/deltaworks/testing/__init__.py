"""What users and our own tests need to attack a pipeline: faults, clocks, list sources. Shipped and supported."""
