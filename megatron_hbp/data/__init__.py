"""Chats in, token store out: `prepare_store` writes a store, `TokenStore.open` reads it.

jsonl.py      bytes -> lines -> decoded JSON objects
formats/      JSON object -> Chat, one module per chat format
chats.py      Chat, its checks, and BadChat with file, line and kind of fault
tokenizer.py  Chat -> tokens and loss mask, by the tokenizer's own chat template
writer.py     tokens and masks -> a directory that appears complete or not at all
manifest.py   what a store records about itself
indexed.py    Megatron-LM's IndexedDataset, imported on first use
store.py      reading a store, and verifying it
prepare.py    the stages above, from chat files to a store
"""
