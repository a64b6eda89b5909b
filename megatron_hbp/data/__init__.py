"""Chats in, token store out: `prepare_store` writes a store, `TokenStore.open` reads it.

chats.py      JSONL lines -> Chat, or BadChat with file, line and kind of fault
tokenizer.py  Chat -> tokens and loss mask, by the tokenizer's own chat template
writer.py     tokens and masks -> a directory that appears whole or not at all
manifest.py   what a store says about itself
store.py      reading it back
prepare.py    the stages above in a row
"""
