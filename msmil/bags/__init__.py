"""Images to bags of instances, on the device."""
