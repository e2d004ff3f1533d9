"""How far two answers to one query are apart: judges of facts and of wording, behind one port."""
