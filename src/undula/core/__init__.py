"""Values: choices and their codec, the ladder of methods, the adapter.  Imports torch, numpy and safetensors alone."""
