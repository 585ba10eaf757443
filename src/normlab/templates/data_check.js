"use strict";
// Marks pictures and writes the marks as CSV. The page is one file and asks nobody for anything.
const data = JSON.parse(document.getElementById("data").textContent);
const decided = new Map(); // picture's name -> {decision, label}
const place = "normlab-check-" + data.id;
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

try { // a page opened from a file may be denied storage
  for (const [name, entry] of JSON.parse(localStorage.getItem(place) || "[]")) decided.set(name, entry);
} catch { /* marks then last as long as the page */ }

function show(tile) {
  const picture = data.pictures[tile.dataset.picture];
  const entry = decided.get(picture.name);
  tile.dataset.decision = entry ? entry.decision : "";
  const words = { exclude: "left out", keep: "kept as it is", relabel: entry && "→ " + entry.label };
  tile.querySelector(".mark").textContent = entry ? words[entry.decision] : "";
  tile.querySelector("select").value = entry && entry.decision === "relabel" ? entry.label : "";
}

function refresh() {
  document.querySelectorAll(".tile").forEach(show);
  const counts = { exclude: 0, relabel: 0, keep: 0 };
  for (const entry of decided.values()) counts[entry.decision]++;
  document.getElementById("count").textContent = decided.size
    ? `${counts.exclude} left out, ${counts.relabel} relabelled, ${counts.keep} kept`
    : "Nothing is decided yet.";
  document.getElementById("save").disabled = !decided.size;
}

function decide(index, decision, label) {
  const picture = data.pictures[index];
  if (decision === "relabel" && label === picture.label) decision = "keep";
  if (!decision) decided.delete(picture.name);
  else decided.set(picture.name, { decision, label: decision === "relabel" ? label : "" });
  // Here alone: a page that is loaded writes nothing, as what it read may be older than what is stored.
  try { localStorage.setItem(place, JSON.stringify([...decided])); } catch { /* as above */ }
  refresh();
}

function tile(index) {
  const picture = data.pictures[index], node = make("div", "tile");
  node.tabIndex = 0;
  node.dataset.picture = index;
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", `${picture.name}, ${picture.label}`);
  const image = make("img", picture.photo ? "photo" : "");
  image.src = picture.source;
  image.alt = "";
  node.append(image, make("div", "name", picture.name));
  node.append(make("div", "label", `${picture.label} · ${picture.part}`), make("div", "mark"));
  const buttons = make("div", "buttons");
  for (const [decision, text] of [["exclude", "leave out"], ["keep", "keep"]]) {
    const button = make("button", "", text);
    button.tabIndex = -1;
    button.onclick = () => {
      const now = decided.get(picture.name);
      decide(index, now && now.decision === decision ? "" : decision);
    };
    buttons.append(button);
  }
  const select = make("select");
  select.tabIndex = -1;
  select.setAttribute("aria-label", "another label");
  select.append(new Option(picture.suggested ? `rather ${picture.suggested}?` : "another label …", ""));
  const names = picture.suggested ? [picture.suggested, ...data.classes] : data.classes;
  for (const name of new Set(names)) select.append(new Option(name, name));
  select.onchange = () => decide(index, select.value ? "relabel" : "", select.value);
  buttons.append(select);
  node.append(buttons);
  return node;
}

for (const section of data.sections) {
  const node = make("section", section.single ? "single" : "");
  node.append(make("h2", "", section.title), make("p", "faint small", section.text));
  for (const action of section.actions) {
    const button = make("button", "wide", `${action.text} (${action.pictures.length})`);
    button.onclick = () => {
      for (const index of action.pictures) {
        if (!decided.has(data.pictures[index].name)) decide(index, "exclude");
      }
    };
    node.append(button);
  }
  const items = make("div", "items");
  for (const item of section.items) {
    const card = make("div", "item"), tiles = make("div", section.single ? "" : "tiles");
    card.append(make("p", "", item.text));
    for (const index of item.pictures) tiles.append(tile(index));
    card.append(tiles);
    items.append(card);
  }
  node.append(items);
  document.getElementById("sections").append(node);
}

const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
function csv() {
  const rows = [["file", "decision", "label", "was"]];
  const labels = new Map(data.pictures.map((picture) => [picture.name, picture.label]));
  for (const [name, entry] of decided) rows.push([name, entry.decision, entry.label, labels.get(name) || ""]);
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}
function save() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "decided.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
document.getElementById("save").onclick = save;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  if (event.key === "s") { if (decided.size) save(); return; }
  const tiles = [...document.querySelectorAll(".tile")];
  const here = event.target.closest(".tile");
  const go = (to) => { if (to) { to.focus(); to.scrollIntoView({ block: "nearest" }); event.preventDefault(); } };
  if (!here) { if (event.key.startsWith("Arrow") && event.target === document.body) go(tiles[0]); return; }
  const at = tiles.indexOf(here), index = +here.dataset.picture, picture = data.pictures[index];
  const next = () => go(tiles[at + 1]);
  if (event.key === "ArrowRight") next();
  else if (event.key === "ArrowLeft") go(tiles[at - 1]);
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const cards = [...document.querySelectorAll(".item")], card = cards.indexOf(here.closest(".item"));
    const other = cards[card + (event.key === "ArrowDown" ? 1 : -1)];
    go(other && other.querySelector(".tile"));
  } else if (event.key === "x") { decide(index, "exclude"); next(); }
  else if (event.key === "k") { decide(index, "keep"); next(); }
  else if (event.key === "u") decide(index, "");
  else if (event.key === "r" && picture.suggested) { decide(index, "relabel", picture.suggested); next(); }
  else if (/^[0-9]$/.test(event.key)) {
    const name = data.classes[event.key === "0" ? 9 : event.key - 1];
    if (name) { decide(index, "relabel", name); next(); }
  }
});
refresh();
