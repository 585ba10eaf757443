import json
def keep(result, out, root):
    out.write_text(json.dumps(result, indent=1))
