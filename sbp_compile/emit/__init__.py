"""Program to what users run: a torch module, an ONNX file, an exported program."""
