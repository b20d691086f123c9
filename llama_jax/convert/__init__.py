"""Weights of the family in and out: Meta's files, Hugging Face's, llama2.c's and our own."""
