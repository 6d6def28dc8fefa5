"""A model of this project as `transformers` wants it: the remote code of an exported folder (tools/hf.py).

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)      a UL2
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)      a BERT
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)                 hidden states of either

model.py and raptr.py lie beside this file; they are the network. `subnetwork=Subnetwork((0, 3, 5))` (raptr.py) runs a
part of the layers, and so does `over(model.stack.blocks, subnetwork)`: RaPTr's fine-tuning. Needs transformers 5.
"""

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, MaskedLMOutput

from model import Config, Stack, make

# What the outputs and the arguments of `forward` call a cache changed within transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RaptrConfig(PreTrainedConfig):
    """The fields of model.Config, which also have the names that transformers gives them."""

    model_type = "raptr"
    attribute_map = {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp",
        "max_position_embeddings": "seq",
        "vocab_size": "vocab",
    }


class RaptrModel(PreTrainedModel):
    config_class = RaptrConfig
    base_model_prefix = ""  # all classes have the weights under the same names

    def __init__(self, config):
        super().__init__(config)
        self.stack = make(Config(**{name: getattr(config, name) for name in Config.__dataclass_fields__}))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Stack):  # from_pretrained leaves empty what is not in the file
            module.make_buffers()

    def get_input_embeddings(self):
        return self.stack.tokens

    def mask(self, tokens, attention_mask, prefix, start):
        """Whom each of the tokens (B, T) may see among `start` earlier ones and themselves: bool (B or 1, 1, T, start +
        T), or None for all."""
        T, mask = tokens.shape[1], None
        place = torch.arange(start + T, device=tokens.device)
        if self.config.arch == "ul2" and T > 1:
            mask = (place <= place[start:, None])[None]
            mask = (mask if prefix is None else mask | (place < prefix[:, None, None]))[:, None]
        if attention_mask is not None and not attention_mask.all():
            if self.config.positions == "learned" and not attention_mask[:, 0].all():
                raise ValueError("this model has learned positions: pad on the right")
            inside = attention_mask.bool()[:, None, None]
            mask = inside if mask is None else mask & inside
            mask = mask | (place == place[start:, None])  # a token of the padding sees itself: no softmax over nothing
        return mask

    def states(self, tokens, attention_mask, prefix=None, cache=None, **more):
        """Hidden states (B, T, C) after the final norm. Tokens come after those in the cache, and are added to it."""
        start = cache.get_seq_length() if cache is not None else 0
        past = None if cache is None else {}
        if start:
            past = {i: {"k": layer.keys, "v": layer.values} for i, layer in enumerate(cache.layers)}
        mask, fast = self.mask(tokens, attention_mask, prefix, start), self.dtype != torch.float32
        with torch.autocast(tokens.device.type, self.dtype if fast else torch.bfloat16, enabled=fast):
            x = self.stack.encode(tokens, mask=mask, past=past, **more)
        for i, layer in (past or {}).items():
            cache.update(layer["k"][:, :, start:], layer["v"][:, :, start:], i)
        return x

    def predict(self, x):
        """Logits (..., V) of states (..., C)."""
        return self.stack.predict(x.to(self.dtype))[..., : self.config.vocab].float()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, prefix=None, subnetwork=None,
                output_hidden_states=False, return_dict=None, **_):  # fmt: skip
        """Hidden states. token_type_ids are read by a model with token types; prefix (B,): of a UL2, so many tokens are
        read in both directions. output_hidden_states: also the input of every block that runs."""
        inputs, types = [], token_type_ids if self.config.types else None
        watched = self.stack.blocks if output_hidden_states else []
        hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in watched]
        try:
            x = self.states(input_ids, attention_mask, prefix, types=types, subnetwork=subnetwork)
        finally:
            for hook in hooks:
                hook.remove()
        output = BaseModelOutput(last_hidden_state=x, hidden_states=(*inputs, x) if output_hidden_states else None)
        return output if return_dict is not False else output.to_tuple()


class RaptrForMaskedLM(RaptrModel):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, subnetwork=None, **more):
        """Logits (B, T, V); with labels (B, T), -100 where there is none, the loss."""
        output = super().forward(input_ids, attention_mask, token_type_ids, subnetwork=subnetwork, **more)
        logits, loss = self.predict(self.stack.head(output[0])), None
        if labels is not None:
            items = {"num_items_in_batch": more.get("num_items_in_batch")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab, **items)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=getattr(output, "hidden_states", None))


class RaptrForCausalLM(RaptrModel, GenerationMixin):
    def forward(self, input_ids, attention_mask=None, prefix=None, labels=None, subnetwork=None, cache=None,
                past_key_values=None, use_cache=False, logits_to_keep=0, num_items_in_batch=None, **_):  # fmt: skip
        """Logits (B, T, V) of the next token. prefix (B,): so many tokens are read in both directions, as a UL2 was
        trained; without it the model is a causal one. labels (B, T), shifted here: the loss."""
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None and use_cache else cache
        x = self.states(input_ids, attention_mask, prefix, cache, subnetwork=subnetwork)
        logits, loss = self.predict(x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x), None
        if labels is not None:
            items = {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab, **items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def generate(self, inputs=None, *args, **kwargs):
        """As in transformers. All tokens of the prompt but the last are read in both directions (`prefix`)."""
        prompt = inputs if inputs is not None else kwargs["input_ids"]
        kwargs.setdefault("prefix", prompt.new_full(prompt.shape[:1], prompt.shape[1] - 1))
        return super().generate(inputs, *args, **kwargs)
