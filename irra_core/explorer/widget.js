// The query explorer's page. All external text is set as textContent, so that it is never interpreted as markup.

const PAUSE = 60; // ms after the last key press before the sentence is searched
const SETTLED = 350; // ms after the last ranking before [MASK] is filled in
// matplotlib's colormap inferno, at five values
const GLOW = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

/** An element with properties and children; a child that is a string becomes a text node. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") for (const [key, item] of Object.entries(value)) element.style.setProperty(key, item);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const plain = (value) => value.toFixed(3).replace("-", "−");
const signed = (value) => (value < 0 ? "" : "+") + plain(value);
const thousandths = (value) => (value < 0 ? "−" : "+") + Math.abs(1000 * value).toFixed(0);

/** Give the browser's user a file. */
function download(name, bytes) {
  const link = make("a", { href: URL.createObjectURL(new Blob([bytes], { type: "image/png" })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** A color of GLOW for 0..1. */
function glow(value) {
  const place = value * (GLOW.length - 1);
  const low = Math.min(Math.floor(place), GLOW.length - 2);
  return GLOW[low].map((part, i) => part + (place - low) * (GLOW[low + 1][i] - part));
}

/** A canvas with one pixel per patch, bright where a word attends. */
function mapCanvas(bytes, rows, cols) {
  const canvas = make("canvas", { className: "irra-map", width: cols, height: rows });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(cols, rows);
  bytes.forEach((byte, i) => {
    pixels.data.set(glow(byte / 255), 4 * i);
    pixels.data[4 * i + 3] = 40 + 0.8 * byte;
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function render({ model, el }) {
  const listeners = [];
  const on = (event, call) => {
    model.on(event, call);
    listeners.push([event, call]);
  };
  const page = {}; // elements of the current view: cards by strip, word chips
  let wordAt = null; // the word under the pointer, else the one that was pressed
  let pressed = null; // the word that was pressed: it stays lit up
  let cardAt = null; // the card under the pointer: {strip, place}
  let opened = null; // the card whose photo is open: {strip, place}
  let timer = null;

  // The search line
  const setup = model.get("setup");
  const box = make("textarea", {
    className: "irra-box", rows: 2, dir: "auto", spellcheck: false, maxLength: setup.longest, value: model.get("query"),
    placeholder: "Describe a person: clothes and their colours, hair, what they carry …",
  });
  box.setAttribute("aria-label", "Description of a person");
  const count = make("select", { className: "irra-count" });
  count.setAttribute("aria-label", "Number of photos");
  const choices = [...new Set([...setup.choices, model.get("k")])].sort((a, b) => a - b);
  for (const k of choices) count.append(make("option", { value: String(k) }, `${k} photos`));
  const examples = make("div", { className: "irra-examples" });
  const note = make("p", { className: "irra-note", role: "status" });
  const words = make("div", { className: "irra-words", dir: "auto" });
  const hint = make("span", { className: "irra-hint" });
  const hold = make("button", { className: "irra-button", type: "button" });
  const save = make("button", { className: "irra-button", type: "button", title: "Download this ranking as a figure (PNG)" }, "Save");
  const moves = make("p", { className: "irra-held" });
  const strips = make("div", { className: "irra-strips" });
  const picture = make("section", { className: "irra-picture", "aria-label": "The photo that you opened" });
  const root = make(
    document.querySelector("main, [role=main]") ? "div" : "main", { className: "irra" },
    make("div", { className: "irra-line", role: "search" }, box, count),
    examples, note,
    make("div", { className: "irra-reading" }, words, make("span", { className: "irra-buttons" }, hold, save)),
    hint, moves, strips, picture,
  );
  root.dataset.lmSuppressShortcuts = "true"; // typed letters must not trigger JupyterLab's shortcuts
  el.append(root);

  const ask = (kind, more = {}) => model.send({ kind, serial: model.get("view").serial, ...more });

  function search(text) {
    clearTimeout(timer);
    if (text === model.get("query")) return;
    model.set("query", text);
    model.save_changes();
  }

  function choose(text) {
    box.value = text;
    search(text);
  }

  box.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => search(box.value), PAUSE);
  });
  const escape = (event) => {
    if (event.key !== "Escape" || (picture.hidden && pressed === null)) return;
    if (!root.contains(event.target) && event.target !== document.body) return; // another part of the notebook
    event.stopPropagation();
    if (picture.hidden) press(pressed);
    else closePicture();
  };
  document.addEventListener("keydown", escape, true);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return;
    event.stopPropagation();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    search(box.value);
  });
  count.addEventListener("change", () => {
    model.set("k", Number(count.value));
    model.save_changes();
  });
  hold.addEventListener("click", () => {
    model.set("held", model.get("held") ? "" : model.get("query"));
    model.save_changes();
  });
  save.addEventListener("click", () => ask("save"));

  // Examples: three at a time
  let first = 0;
  function drawExamples() {
    const all = setup.examples;
    examples.replaceChildren();
    if (!all.length) return;
    examples.append(make("span", { className: "irra-label" }, "Try"));
    for (let i = 0; i < Math.min(3, all.length); i++) {
      const text = all[(first + i) % all.length];
      const chip = make("button", { className: "irra-example", type: "button", title: text, dir: "auto" }, text);
      chip.classList.toggle("irra-active", text === model.get("query").trim());
      chip.addEventListener("click", () => choose(text));
      examples.append(chip);
    }
    if (all.length <= 3) return;
    const more = make("button", { className: "irra-more", type: "button" }, "others");
    more.addEventListener("click", () => {
      first = (first + 3) % all.length;
      drawExamples();
    });
    examples.append(more);
  }

  // The sentence as the model reads it
  function drawWords() {
    const view = model.get("view");
    page.words = view.words.map((word, i) => {
      const parts = [make("span", {}, word), make("small", {})];
      if (!setup.explains) return make("span", { className: "irra-word" }, ...parts);
      const chip = make("button", { className: "irra-word", type: "button", "aria-pressed": "false" }, ...parts);
      const enter = () => point({ word: i });
      chip.addEventListener("pointerenter", enter);
      chip.addEventListener("focus", enter);
      chip.addEventListener("click", () => press(i));
      for (const end of ["pointerleave", "blur"]) chip.addEventListener(end, () => point({ word: pressed }));
      return chip;
    });
    words.replaceChildren(...page.words);
    words.classList.toggle("irra-touchable", setup.explains);
  }

  // The photos
  function drawCard(card, strip, place, cell) {
    const known = card.right === true || card.right === false;
    const verdict = known ? (card.right ? "✓" : "✗") : "";
    const photo = make("div", { className: "irra-photo" });
    if (card.src) photo.append(make("img", { src: card.src, alt: "", draggable: false }));
    else photo.append(make("span", { className: "irra-missing" }, `${card.name} cannot be read`));
    photo.style.setProperty("aspect-ratio", String(card.ratio));
    photo.style.setProperty(card.ratio > cell ? "width" : "height", "100%");
    const said = [`rank ${card.rank}`, known && (card.right ? "right" : "wrong"), `score ${plain(card.score)}`];
    if (card.beats !== undefined) said.push(`above ${card.beats} of 100 other descriptions`);
    const element = make(
      "button", { className: "irra-card", type: "button", "aria-label": said.filter(Boolean).join(", ") },
      make("span", { className: "irra-rank" }, make("b", {}, String(card.rank)), make("i", {}, verdict), moved(card)),
      make("div", { className: "irra-cell", style: { "aspect-ratio": String(cell) } }, photo),
      make("span", { className: "irra-score" }, plain(card.score)),
      beats(card),
      card.pid === null ? null : make("span", { className: "irra-pid" }, `id ${card.pid}`),
      make("span", { className: "irra-fill" }),
    );
    if (known) element.classList.add(card.right ? "irra-right" : "irra-wrong");
    element.dataset.imageId = card.image_id;
    element.addEventListener("click", () => {
      if (strip !== null) opened = { strip, place };
      ask("picture", { image_id: card.image_id });
    });
    if (strip === null || !setup.explains) return element;
    const enter = () => point({ card: { strip, place } });
    element.addEventListener("pointerenter", enter);
    element.addEventListener("focus", enter);
    for (const end of ["pointerleave", "blur"]) element.addEventListener(end, () => point({ card: null }));
    return element;
  }

  function beats(card) {
    if (card.beats === undefined) return null;
    const title = `Of 100 other descriptions, ${card.beats} score lower on this photo than yours.`;
    return make("span", { className: "irra-beats", title }, `beats ${card.beats} %`);
  }

  function moved(card) {
    if (card.moved === undefined || card.moved === 0) return null;
    const text = card.moved === "new" ? "new" : card.moved > 0 ? `▲${card.moved}` : `▼${-card.moved}`;
    return make("small", { className: "irra-moved" }, text);
  }

  const narrowest = (cards) => Math.max(1 / 3, Math.min(...cards.map((card) => card.ratio), 1));

  function drawStrips() {
    const view = model.get("view");
    const all = view.strips.flatMap((strip) => strip.cards);
    const cell = narrowest(view.truth ? [...all, view.truth] : all);
    const places = positions();
    const [row, column] = focused();
    page.cards = view.strips.map((strip, s) => strip.cards.map((card, place) => drawCard(card, s, place, cell)));
    const rows = view.strips.map((strip, s) => {
      const grid = make("div", { className: "irra-grid", role: "group", "aria-label": `Photos ${strip.name}`.trim() }, ...page.cards[s]);
      grid.style.setProperty("--columns", String(Math.min(Math.max(strip.cards.length, 5), 10)));
      const head = make("h4", {}, make("b", {}, strip.name), make("span", {}, strip.standing));
      return make("div", { className: "irra-strip" }, strip.name || strip.standing ? head : null, grid);
    });
    const truth = view.truth && make(
      "div", { className: "irra-truth" },
      make("span", { className: "irra-rank" }, "its photo"),
      make("div", { className: "irra-cell", style: { "aspect-ratio": String(cell) } }, make("img", { src: view.truth.src, alt: "The photo that this sentence describes" })),
      make("span", { className: "irra-pid" }, `id ${view.truth.pid}`),
    );
    strips.replaceChildren(...[truth, make("div", { className: "irra-rows" }, ...rows)].filter(Boolean));
    strips.classList.toggle("irra-with-truth", Boolean(truth));
    page.cards[row]?.[column]?.focus({ preventScroll: true });
    placePicture();
    glide(places);
  }

  /** Strip and place of the card that has the keyboard's focus, which a new ranking would take away. */
  function focused() {
    const root = strips.getRootNode();
    const found = (page.cards || []).map((cards) => cards.indexOf(root.activeElement));
    const row = found.findIndex((place) => place >= 0);
    return [row, found[row]];
  }

  /** The present position of each photo on the page, from which a change of rank is animated. */
  function positions() {
    const found = new Map();
    (page.cards || []).forEach((cards, s) => cards.forEach((card) => {
      found.set(`${s} ${card.dataset.imageId}`, card.getBoundingClientRect());
    }));
    return found;
  }

  function glide(before) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    page.cards.forEach((cards, s) => cards.forEach((card) => {
      const old = before.get(`${s} ${card.dataset.imageId}`);
      if (!old || !old.width) return;
      const now = card.getBoundingClientRect();
      const shift = `translate(${old.left - now.left}px, ${old.top - now.top}px)`;
      if (old.left !== now.left || old.top !== now.top) card.animate([{ transform: shift }, { transform: "none" }], 180);
    }));
  }

  function drawView() {
    const view = model.get("view");
    const shown = view.strips.length > 0;
    root.classList.toggle("irra-empty", !shown);
    if (document.activeElement !== box) box.value = model.get("query");
    count.value = String(model.get("k"));
    wordAt = cardAt = pressed = null;
    drawExamples();
    drawWords();
    drawStrips();
    const held = model.get("held");
    hold.textContent = held ? "Stop comparing" : "Hold this ranking";
    hold.title = held ? "" : "Then edit a word: arrows show which photos rise and fall";
    moves.textContent = held ? `▲▼ against “${held}”` : "";
    explainHow();
    clearTimeout(page.filling);
    if (view.masks) page.filling = setTimeout(() => ask("fill"), SETTLED);
    drawFills();
  }

  // Explanation: maps and contributions
  function point(change) {
    if ("word" in change) wordAt = change.word ?? pressed;
    if ("card" in change) cardAt = change.card;
    if ((wordAt !== null || cardAt) && needed()) {
      clearTimeout(page.asking);
      page.asking = setTimeout(() => ask("explain", cardAt || {}), 60);
      root.classList.add("irra-waiting");
    }
    drawWhy();
  }

  /** A pressed word stays lit up until it is pressed again: for fingers and keyboards, which do not point. */
  function press(word) {
    pressed = pressed === word ? null : word;
    page.words.forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === pressed)));
    point({ word: pressed });
  }

  function explained(strip, place) {
    const found = model.get("explanation");
    if (found.serial !== model.get("view").serial) return null;
    const part = found.strips[strip];
    return part && part.photos && part.photos[place] ? { ...part, ...part.photos[place] } : null;
  }

  const needed = () => (cardAt ? !explained(cardAt.strip, cardAt.place)?.map : model.get("explanation").serial !== model.get("view").serial);

  function drawWhy() {
    const view = model.get("view");
    page.cards.forEach((cards, s) => cards.forEach((card, place) => {
      const photo = card.querySelector(".irra-photo");
      photo.querySelector("canvas")?.remove();
      const found = wordAt === null ? null : explained(s, place);
      photo.classList.toggle("irra-dim", Boolean(found?.map));
      card.querySelector(".irra-score").textContent = found ? signed(found.words[wordAt]) : plain(view.strips[s].cards[place].score);
      card.classList.toggle("irra-of-a-word", Boolean(found));
      if (!found?.map) return;
      const size = found.rows * found.cols;
      const bytes = Uint8Array.from(atob(found.map), (letter) => letter.charCodeAt(0));
      photo.append(mapCanvas(bytes.slice(wordAt * size, (wordAt + 1) * size), found.rows, found.cols));
    }));
    const why = cardAt && explained(cardAt.strip, cardAt.place);
    const most = why ? Math.max(...why.words.map(Math.abs), 1e-6) : 1;
    page.words.forEach((chip, i) => {
      const value = why ? why.words[i] : 0;
      const color = value < 0 ? "213, 94, 0" : "0, 114, 178";
      chip.style.background = why ? `rgba(${color}, ${(0.45 * Math.abs(value)) / most})` : "";
      chip.lastChild.textContent = why ? thousandths(value) : "";
      chip.classList.toggle("irra-active", wordAt === i);
    });
    explainHow();
  }

  function explainHow() {
    if (!setup.explains || !model.get("view").strips.length) hint.textContent = "";
    else if (wordAt !== null) hint.textContent = `${lightMeans()} Below each photo: how far its score falls without the word.`;
    else if (cardAt) hint.textContent = "Below each word: how far this photo's score falls without it, in thousandths (orange: it rises).";
    else {
      const compared = model.get("view").strips.some((strip) => strip.cards.some((card) => card.beats !== undefined));
      const means = compared ? " Below each photo: its score, and the share of 100 other descriptions that score lower on it." : "";
      hint.textContent = `Point at a word or press it to see where it looks, point at a photo to see which words count.${means}`;
    }
  }

  function lightMeans() {
    const methods = new Set((model.get("explanation").strips || []).map((strip) => strip.method));
    if (methods.size > 1) return "Light: where the word looks; without word-to-patch attention, where covering a photo costs the word its share.";
    if (!methods.has("drop-one-patch")) return "Light shows where the word looks.";
    return "This model has no word-to-patch attention: light shows where covering a photo that you pointed at costs the word its share.";
  }

  // Words predicted for [MASK]
  function drawFills() {
    const fills = model.get("fills");
    const current = fills.serial === model.get("view").serial;
    page.cards.forEach((cards, s) => cards.forEach((card, place) => {
      const slot = card.querySelector(".irra-fill");
      const strip = current ? fills.strips[s] : null;
      slot.replaceChildren();
      if (!strip) return;
      if (strip.note && place === 0) slot.append(strip.note);
      for (const mask of strip.photos[place] || []) {
        slot.append(make("span", { className: "irra-guesses" }, ...mask.map(([word, probability]) => {
          const share = `${(100 * probability).toFixed(1)}%`;
          const guess = make("span", {}, make("span", {}, word), make("small", {}, `${Math.round(100 * probability)} %`));
          guess.style.setProperty("--share", share);
          return guess;
        })));
      }
    }));
  }

  // One photo: its captions and its neighbours
  function drawPicture() {
    const shown = model.get("picture");
    picture.replaceChildren();
    picture.hidden = !shown.name;
    if (!shown.name) return;
    const close = make("button", { className: "irra-button", type: "button", title: "Escape closes it too" }, "Close");
    close.addEventListener("click", closePicture);
    const title = shown.pid === null ? shown.name : `Identity ${shown.pid}`;
    const text = make("div", { className: "irra-about" }, make("h4", {}, make("b", {}, title), make("span", { className: "irra-place" }), close));
    for (const caption of shown.captions) {
      const chip = make("button", { className: "irra-caption", type: "button", dir: "auto", title: "Search with this sentence" }, caption);
      chip.addEventListener("click", () => choose(caption));
      text.append(chip);
    }
    if (shown.captions.length) text.children[0].after(make("p", { className: "irra-label" }, "What people wrote of it; click to search with it"));
    else text.append(make("p", { className: "irra-hint" }, "Nobody wrote a sentence of this photo."));
    if (shown.neighbours?.length) {
      const cell = narrowest(shown.neighbours);
      const grid = make("div", { className: "irra-grid" }, ...shown.neighbours.map((card) => drawCard(card, null, 0, cell)));
      grid.style.setProperty("--columns", "10");
      text.append(make("p", { className: "irra-label" }, ["The photos most like it", shown.standing].filter(Boolean).join(" · ")), grid);
    }
    picture.append(make("img", { src: shown.src, alt: `Photo ${shown.name}` }), text);
    drawPlace();
    placePicture();
    if (opened === null) return;
    close.focus({ preventScroll: true });
    picture.scrollIntoView({ block: "nearest" });
  }

  /** Where the open photo is in the ranking, which changes with the query. */
  function drawPlace() {
    const place = picture.querySelector(".irra-place");
    const [view, shown] = [model.get("view"), model.get("picture")];
    const now = shown.serial === view.serial ? shown.open : view.open; // opened after the search, or before it
    if (place) place.textContent = [shown.name, now].filter(Boolean).join(" · ");
  }

  /** Put the open photo below the row of the card that was clicked; without one, below all. */
  function placePicture() {
    const cards = opened && page.cards?.[opened.strip];
    if (!cards?.length) return root.append(picture);
    const columns = getComputedStyle(cards[0].parentElement).gridTemplateColumns.split(" ").length;
    const last = Math.floor(Math.min(opened.place, cards.length - 1) / columns) * columns + columns - 1;
    const before = cards[Math.min(last, cards.length - 1)];
    if (before.nextElementSibling === picture) return;
    const focused = picture.contains(document.activeElement) ? document.activeElement : null;
    before.after(picture);
    focused?.focus({ preventScroll: true }); // what is moved loses it
  }

  function closePicture() {
    const card = opened && page.cards?.[opened.strip]?.[opened.place];
    picture.hidden = true;
    opened = null;
    ask("picture", { image_id: null });
    (card || box).focus();
  }

  function drawNote() {
    note.textContent = model.get("note");
    root.classList.remove("irra-waiting");
  }
  on("change:view", () => {
    drawView();
    drawPlace();
  });
  on("msg:custom", (message, buffers) => {
    if (message.kind === "figure") download(message.name, buffers[0]);
  });
  on("change:note", drawNote);
  on("change:explanation", () => {
    root.classList.remove("irra-waiting");
    drawWhy();
  });
  on("change:fills", drawFills);
  on("change:picture", drawPicture);
  drawView();
  drawNote();
  drawPicture();
  const resized = new ResizeObserver(placePicture);
  resized.observe(root);
  return () => {
    resized.disconnect();
    document.removeEventListener("keydown", escape, true);
    clearTimeout(timer);
    for (const [event, call] of listeners) model.off(event, call);
  };
}

export default { render };
