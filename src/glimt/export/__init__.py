"""The vision tower as an offline model: traced to ONNX, compared, compiled to OM."""
