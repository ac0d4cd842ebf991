"""Hallucinated captions: false sentences beside true ones, of the four types object, attribute, relation and event.

`generator.build_generator` is the entry point: it gives one of three generators (rules, a local language model, a chat
endpoint) behind one interface, whose lies have passed `filtering` and whose text alone does not tell them from truths
as far as `measurement` can see. Nothing here knows of images, shards or stages.
"""
