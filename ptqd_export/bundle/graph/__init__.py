"""What `graph_check` needs to know of ONNX: how its files are read, its operators, the shapes they give."""
