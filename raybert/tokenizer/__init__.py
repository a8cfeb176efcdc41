"""Text <-> ids. GPT-2's vocabulary with BERT's specials is raybert's own; any other comes from a tokenizer.json.

vocabulary.py   what a tokenizer is, and what the rest needs to know of it
gpt2.py         raybert's own, on tiktoken
fast.py         any tokenizer.json, on the library `tokenizers`
files.py        where a tokenizer lies, which of its tokens are special
"""

from raybert.tokenizer.files import load as load
from raybert.tokenizer.gpt2 import CLS_ID as CLS_ID
from raybert.tokenizer.gpt2 import GPT2 as GPT2
from raybert.tokenizer.gpt2 import MASK_ID as MASK_ID
from raybert.tokenizer.gpt2 import NUM_TEXT_TOKENS as NUM_TEXT_TOKENS
from raybert.tokenizer.gpt2 import PAD_ID as PAD_ID
from raybert.tokenizer.gpt2 import SEP_ID as SEP_ID
from raybert.tokenizer.gpt2 import VOCAB_SIZE as VOCAB_SIZE
from raybert.tokenizer.gpt2 import Tokenizer as Tokenizer
from raybert.tokenizer.gpt2 import vocabulary_files as vocabulary_files
from raybert.tokenizer.vocabulary import TextTokenizer as TextTokenizer
from raybert.tokenizer.vocabulary import Vocabulary as Vocabulary
