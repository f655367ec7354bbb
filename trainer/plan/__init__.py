"""What a run will do, worked out before anything starts: values and their origins, devices, batches, memory."""
