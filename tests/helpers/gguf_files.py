"""The end of every GGUF file that a test writes."""


def close(writer):
    """Writes what a GGUFWriter holds, and closes its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
