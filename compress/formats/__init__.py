"""Files a board can run: ONNX (exported by torch, integers put in by us) and TFLite (written from that ONNX)."""
