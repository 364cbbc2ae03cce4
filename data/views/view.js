// One front end for every view: in a notebook, where Python answers, and on a page, where the picture brings all its frames.
// A classic script, since a module cannot be loaded from a file; the notebook's widget appends its own `export default`.
const cola = (() => {
  "use strict";
  // Colours that would drown in a dark page are exchanged there: INK, QUIET, black, and the darkest blue of OKABE_ITO. The others keep.
  const THEMES = {
    light: { swap: {}, ink: "#1a1a1a", grid: "#e3e3e3", paper: "#ffffff" },
    dark: { swap: { "#101010": "#f2f2f2", "#000000": "#f2f2f2", "#C8C8C8": "#565b61", "#0072B2": "#3b9bd9" }, ink: "#ececec", grid: "#3a3e43", paper: "#16181b" },
  };
  const NARROW = 560; // pixels: below, panels stand below one another
  const PATIENCE = 20000; // milliseconds without an answer before we say so
  const OWN = document.currentScript?.src ?? ""; // where this script came from, "" inside a notebook
  const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !("bdata" in value);
  const merge = (old, news) => {
    const made = { ...old };
    for (const [key, value] of Object.entries(news)) made[key] = isRecord(value) && isRecord(made[key]) ? merge(made[key], value) : value;
    return made;
  };
  const swapped = (value, colours) => {
    if (typeof value === "string") return colours[value] ?? value;
    if (Array.isArray(value)) return value.map((one) => swapped(one, colours));
    if (!isRecord(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, swapped(one, colours)]));
  };
  const isDark = () => {
    const { jpThemeLight } = document.body.dataset, { theme } = document.documentElement.dataset;
    if (jpThemeLight) return jpThemeLight === "false";
    if (theme === "dark" || theme === "light") return theme === "dark";
    if (document.body.classList.contains("vscode-dark")) return true;
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const whenThemeChanges = (act) => {
    const watcher = new MutationObserver(act), media = matchMedia("(prefers-color-scheme: dark)");
    watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    media.addEventListener("change", act);
    return () => { watcher.disconnect(); media.removeEventListener("change", act); };
  };

  // A key pressed here is meant for what it is pressed on: a notebook around it would take an arrow as a wish for the next heading.
  const keepKeys = (element) => {
    const keep = (event) => { if (element.contains(event.target)) event.target.toggleAttribute("data-lm-suppress-shortcuts", !event.ctrlKey && !event.metaKey); };
    window.addEventListener("keydown", keep, true);
    return () => window.removeEventListener("keydown", keep, true);
  };

  // What is drawn: the picture at a step, in the theme's colours, in the room that there is.
  const composed = (picture, step, dark, width) => {
    const frame = (picture.figure.frames ?? [])[step], colours = THEMES[dark ? "dark" : "light"];
    const data = [...picture.figure.data];
    let layout = picture.figure.layout;
    (frame?.data ?? []).forEach((trace, i) => { const place = frame.traces?.[i] ?? i; data[place] = merge(data[place], trace); });
    if (frame?.layout) layout = merge(layout, frame.layout);
    if (width < NARROW) {
      layout = merge(layout, layout.meta?.narrow ?? {});
      data.forEach((trace, i) => { data[i] = merge(trace, trace.meta?.narrow ?? {}); });
    }
    const plain = { paper_bgcolor: colours.paper, plot_bgcolor: colours.paper, autosize: true, width: undefined, font: { color: colours.ink }, uirevision: "kept" };
    layout = merge(layout, plain);
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)))
      layout[name] = merge({ gridcolor: colours.grid, zerolinecolor: colours.grid, linecolor: colours.grid, automargin: true }, layout[name]);
    return { data: swapped(data, colours.swap), layout: swapped(layout, colours.swap) };
  };

  const decimals = (step) => Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const field = (control, id) => {
    const about = { id, name: control.name, title: control.hint || null };
    if (control.kind === "choice") {
      const options = control.options.map(([text, value], i) => make("option", { value: i, selected: value === control.value }, text));
      return make("select", about, ...options);
    }
    if (control.kind === "toggle") return make("input", { ...about, type: "checkbox", checked: control.value });
    if (control.kind === "button") return make("button", { ...about, type: "button" }, control.label);
    const type = { slider: "range", number: "number", text: "text" }[control.kind];
    const range = control.kind === "text" ? { placeholder: control.hint || null } : { min: control.low, max: control.high, step: control.step };
    const element = make("input", { ...about, ...range, type });
    element.value = control.value;
    return element;
  };

  let count = 0;
  // Puts a view into `host`. `talk`: plotly() gives a promise of the drawing library; ask(message) asks Python, null where there is none;
  // sources() gives a promise of the texts that a page of its own needs, null where they cannot be had.
  const mount = (host, spec, talk) => {
    const id = `cola-${++count}-${Math.random().toString(36).slice(2, 8)}`, values = {}, inputs = {}, undo = [];
    let picture = spec.picture ?? null, step = picture?.start ?? 0, waiting = false, wanted = false, playing = null, drawing = false, again = false, Plotly = null, patience = null, held = "";

    const title = make("p", { class: "cola-title", id: `${id}-title` }, spec.title);
    const form = make("div", { class: "cola-controls", role: "group", "aria-label": "Controls" });
    const player = make("div", { class: "cola-controls", role: "group", "aria-label": "Steps" });
    const plot = make("div", { class: "cola-plot", "aria-describedby": `${id}-caption` });
    const text = make("div", { class: "cola-text", "aria-live": "polite" });
    const status = make("p", { class: "cola-status", role: "status" });
    const caption = make("figcaption", { class: "cola-caption", id: `${id}-caption` }, spec.caption);
    const tools = make("div", { class: "cola-tools", role: "group", "aria-label": "Save the picture" });
    const figure = make("figure", { class: "cola-view", role: "group", "aria-labelledby": `${id}-title`, "data-cola-view": id });
    figure.append(title, form, player, plot, text, status, caption, tools);
    host.replaceChildren(figure);

    const say = (message) => { status.textContent = message; };
    const ask = (pressed = null) => {
      if (!talk.ask) return;
      if (waiting) { wanted = wanted || { pressed: null }; wanted.pressed = wanted.pressed ?? pressed; return; } // asked when the answer is here: the last value wins, nothing queues
      waiting = true;
      figure.setAttribute("aria-busy", "true");
      talk.ask({ view: id, values, pressed });
      clearTimeout(patience);
      patience = setTimeout(() => say("Python has not answered for 20 seconds. Is the kernel busy with another cell? If it was stopped, run this cell again."), PATIENCE);
    };
    const answer = (message) => {
      if (message.view === id) {
        waiting = false;
        clearTimeout(patience);
        figure.removeAttribute("aria-busy");
      } else if (message.view) return;
      if (message.error) say(message.error);
      else {
        say("");
        take(message.picture);
      }
      if (wanted) { const { pressed } = wanted; wanted = false; ask(pressed); }
    };
    const take = (news) => {
      const before = (picture?.figure.frames ?? []).length, atEnd = step >= before - 1;
      picture = news;
      const frames = (picture.figure.frames ?? []).length;
      if (frames !== before) step = picture.start ?? (atEnd ? frames - 1 : 0);
      step = Math.min(Math.max(step, 0), Math.max(frames - 1, 0));
      for (const control of picture.controls ?? []) if (!(inputs[control.name]?.contains(document.activeElement) && control.kind === "text")) { values[control.name] = control.value; if (control.kind !== "hidden") put(control); }
      steps();
      draw();
    };

    // Controls: native ones, so that keys, names and touch come with the browser.
    const put = (control) => {
      const input = field(control, `${id}-${control.name}`), wide = control.kind === "text" || control.kind === "slider";
      const shown = control.kind === "slider" ? make("output", { for: input.id }) : null;
      const label = control.kind === "button" ? input : make("label", { class: wide ? "cola-wide" : null, for: input.id }, make("span", {}, control.label), input, ...(shown ? [shown] : []));
      const show = () => { if (shown) { shown.textContent = Number(input.value).toFixed(decimals(control.step)); } };
      const read = () => {
        if (control.kind === "choice") return control.options[Number(input.value)][1];
        if (control.kind === "toggle") return input.checked;
        return control.kind === "text" ? input.value : Number(input.value);
      };
      const moved = () => {
        if (control.kind === "number" && (input.value === "" || !input.checkValidity())) { say(`${control.label}: ${input.validationMessage || "give a number"}`); return; }
        if (control.kind === "text" && values[control.name] === read()) return; // Enter has told it already
        values[control.name] = read(); show(); ask();
      };
      if (control.kind === "button") input.addEventListener("click", () => ask(control.name));
      else input.addEventListener(control.kind === "slider" ? "input" : "change", moved);
      // Enter means: take it. Neither every browser nor every notebook around lets the key do so by itself.
      if (control.kind === "text" || control.kind === "number") input.addEventListener("keydown", (event) => { if (event.key === "Enter") moved(); });
      show();
      label.cola = { input, show };
      const focused = inputs[control.name]?.contains(document.activeElement);
      if (inputs[control.name]) inputs[control.name].replaceWith(label);
      else form.append(label);
      inputs[control.name] = label;
      if (focused) input.focus();
    };
    for (const control of spec.controls) { values[control.name] = control.value; if (control.kind !== "hidden") put(control); }

    // Steps: they live in the browser, so that a slider and a button move them at once.
    const play = make("button", { type: "button", "aria-pressed": "false" }, "Play");
    const scrub = make("input", { type: "range", id: `${id}-step`, min: 0, step: 1, value: 0 });
    const where = make("output", { for: `${id}-step` }), named = make("span", {});
    player.append(play, make("label", { class: "cola-wide", for: `${id}-step` }, named, scrub, where));
    const steps = () => {
      const frames = picture?.figure.frames ?? [];
      player.hidden = frames.length < 2;
      player.style.display = player.hidden ? "none" : "";
      named.textContent = picture?.step_label ?? "step";
      scrub.max = Math.max(frames.length - 1, 0);
      scrub.value = step;
      where.textContent = frames[step]?.name ?? "";
      scrub.setAttribute("aria-valuetext", `${named.textContent} ${where.textContent}`);
    };
    const go = (to) => { step = to; steps(); draw(); };
    const stop = () => { clearInterval(playing); playing = null; play.textContent = "Play"; play.setAttribute("aria-pressed", "false"); };
    scrub.addEventListener("input", () => { stop(); go(Number(scrub.value)); });
    play.addEventListener("click", () => {
      if (playing) { stop(); return; }
      const last = (picture?.figure.frames ?? []).length - 1;
      if (step >= last) go(0);
      play.textContent = "Pause";
      play.setAttribute("aria-pressed", "true");
      playing = setInterval(() => { if (step >= last || !figure.isConnected) stop(); else go(step + 1); }, 300);
    });

    // Drawing: never two at once, and the last wish is always drawn.
    const draw = async () => {
      if (drawing) { again = true; return; }
      drawing = true;
      do {
        again = false;
        Plotly = Plotly ?? await talk.plotly();
        if (!picture || !figure.isConnected) break;
        const dark = isDark(), width = figure.clientWidth;
        if (!width) break; // hidden: the observer below draws when it is shown
        figure.dataset.colaTheme = dark ? "dark" : "light";
        const { data, layout } = composed(picture, step, dark, width);
        // An axis whose domain gives way to keep its scale would hold on to its first range: with another one, begin anew.
        const ranges = JSON.stringify(Object.values(layout).filter((axis) => axis?.constrain === "domain").map((axis) => axis.range));
        if (ranges !== held) Plotly.purge(plot);
        held = ranges;
        await Plotly.react(plot, data, layout, CONFIG);
        const words = Array.isArray(picture.texts) ? picture.texts[Math.min(step, picture.texts.length - 1)] ?? "" : picture.texts ?? "";
        if (text.dataset.shown !== words) { text.innerHTML = words; text.dataset.shown = words; }
        if (spec.pointer) showCursor();
        else { plot.setAttribute("role", "img"); plot.setAttribute("aria-label", `${spec.title}. ${picture.alt ?? spec.caption}`); }
        figure.dataset.colaDrawn = `${step}`;
      } while (again);
      drawing = false;
    };
    undo.push(whenThemeChanges(() => draw()), keepKeys(figure));
    let lastWidth = 0;
    const sizes = new ResizeObserver(() => { const width = figure.clientWidth; if (width && Math.abs(width - lastWidth) > 2) { lastWidth = width; draw(); } });
    sizes.observe(figure);
    undo.push(() => sizes.disconnect());

    // The pointer, and the same from the keyboard: arrows move a cursor, space is the pen.
    let cursor = null, pen = null;
    const ring = make("div", { class: "cola-cursor", "aria-hidden": "true" });
    const axes = () => [plot._fullLayout.xaxis, plot._fullLayout.yaxis];
    const toData = (event) => {
      const [x, y] = axes(), box = plot.getBoundingClientRect();
      const px = event.clientX - box.left - x._offset, py = event.clientY - box.top - y._offset;
      const clip = (p, axis) => Math.min(Math.max(p, 0), axis._length);
      const inside = px >= 0 && py >= 0 && px <= x._length && py <= y._length;
      return { at: [x.p2d(clip(px, x)), y.p2d(clip(py, y))], inside };
    };
    const toPixels = (at) => axes().map((axis, i) => axis._offset + axis.d2p(at[i]));
    const showCursor = () => {
      if (!cursor || !plot._fullLayout?.xaxis) { ring.remove(); return; }
      const [left, top] = toPixels(cursor);
      ring.style.left = `${left}px`; ring.style.top = `${top}px`;
      plot.append(ring);
    };
    const pressAt = (at) => {
      const { kind, names } = spec.pointer;
      if (kind === "drag") {
        names.forEach((name, i) => {
          const { input, show } = inputs[name].cola;
          input.value = at[i].toFixed(decimals(Number(input.step))); values[name] = Number(input.value); show();
        });
        ask();
      } else if (kind === "paint") {
        const [column, row] = at.map(Math.round), cells = values[names[0]];
        if (cells[row]?.[column] === undefined) return;
        pen = pen ?? { paint: cells[row][column] ? 0 : 1 };
        if (cells[row][column] === pen.paint) return;
        cells[row][column] = pen.paint;
        say(`row ${row}, column ${column}: ${pen.paint ? "on" : "off"}`);
        ask();
      } else pen = pen ?? { from: at };
    };
    const rub = (at) => {
      if (spec.pointer.kind !== "stroke") { pressAt(at); return; }
      const [from, to] = [pen.from, at].map(toPixels), space = "http://www.w3.org/2000/svg";
      const svg = plot.querySelector(".cola-stroke") ?? plot.appendChild(document.createElementNS(space, "svg"));
      svg.setAttribute("class", "cola-stroke");
      const line = svg.firstChild ?? svg.appendChild(document.createElementNS(space, "line"));
      [["x1", from[0]], ["y1", from[1]], ["x2", to[0]], ["y2", to[1]]].forEach(([name, value]) => line.setAttribute(name, value));
    };
    const lift = (at) => {
      if (pen?.from) {
        plot.querySelector(".cola-stroke")?.remove();
        const [name] = spec.pointer.names;
        values[name] = [...values[name], [...pen.from, at[0] - pen.from[0], at[1] - pen.from[1]]];
        ask();
      }
      pen = null;
    };
    if (spec.pointer && talk.ask) {
      plot.classList.add("cola-pointer");
      plot.tabIndex = 0;
      plot.setAttribute("role", "application");
      plot.setAttribute("aria-label", `${spec.pointer.label} Arrow keys move the cursor${spec.pointer.kind === "drag" ? "" : ", space presses and lifts the pen"}.`);
      let down = false;
      const hold = (event) => { event.stopPropagation(); };
      plot.addEventListener("mousedown", hold, true);
      plot.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || !plot._fullLayout?.xaxis) return;
        const { at, inside } = toData(event);
        if (!inside) return;
        event.stopPropagation();
        plot.setPointerCapture(event.pointerId);
        plot.focus({ preventScroll: true });
        down = true; cursor = null; ring.remove(); pen = null;
        pressAt(at);
      }, true);
      plot.addEventListener("pointermove", (event) => { if (down) { event.stopPropagation(); rub(toData(event).at); } }, true);
      const up = (event) => { if (down) { down = false; lift(toData(event).at); } };
      plot.addEventListener("pointerup", up, true);
      plot.addEventListener("pointercancel", up, true);
      plot.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
        const move = moves[event.key], [x, y] = axes();
        if (!move && event.key !== " " && event.key !== "Enter" && event.key !== "Escape") return;
        event.preventDefault(); event.stopPropagation();
        const ends = [x, y].map((axis) => [...axis.range].sort((a, b) => a - b));
        const kind = spec.pointer.kind;
        cursor = cursor ?? (kind === "drag" ? spec.pointer.names.map((name) => values[name]) : ends.map(([low, high]) => (kind === "paint" ? Math.round((low + high) / 2) : (low + high) / 2)));
        if (event.key === "Escape") { pen = null; plot.querySelector(".cola-stroke")?.remove(); }
        else if (move) {
          const size = ends.map(([low, high]) => (kind === "paint" ? 1 : (high - low) / (event.shiftKey ? 100 : 25)));
          const turned = [x, y].map((axis) => (axis.range[0] > axis.range[1] ? -1 : 1));
          cursor = cursor.map((value, i) => Math.min(Math.max(value + move[i] * turned[i] * size[i], ends[i][0]), ends[i][1]));
          if (kind === "paint") cursor = cursor.map(Math.round);
          say(`cursor at ${cursor.map((value) => Number(value.toPrecision(3))).join(", ")}`);
          if (kind === "drag") pressAt(cursor);
          else if (pen) rub(cursor);
        } else if (kind === "stroke" && pen) lift(cursor);
        else if (kind !== "drag") { pressAt(cursor); if (kind === "paint") pen = null; }
        showCursor();
      });
    }

    // Saving
    const name = spec.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "view";
    const download = (blob, file) => {
      const link = make("a", { href: URL.createObjectURL(blob), download: file });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    };
    for (const format of ["png", "svg"]) {
      const button = make("button", { type: "button" }, `Save ${format.toUpperCase()}`);
      button.addEventListener("click", () => Plotly?.downloadImage(plot, { format, filename: name, width: plot.clientWidth, height: plot.clientHeight, scale: format === "png" ? 2 : 1 }));
      tools.append(button);
    }
    if (talk.sources) {
      const button = make("button", { type: "button" }, "Save HTML");
      button.addEventListener("click", async () => {
        const { plotly, script, style } = await talk.sources();
        const still = { title: spec.title, caption: spec.caption, controls: [], picture: { ...picture, controls: [] } };
        const safe = (code) => code.replaceAll("</script", "<\\/script");
        download(new Blob([
          `<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>${make("p", {}, spec.title).innerHTML}</title>`,
          `<style>${style}</style></head><body><div class="cola-still"><script type="application/json">${JSON.stringify(still).replaceAll("<", "\\u003c")}</script></div>`,
          `<script>${safe(plotly)}</script><script>${safe(script)}\ncola.awaken(document);</script></body></html>`,
        ], { type: "text/html" }), `${name}.html`);
      });
      tools.append(button);
    }

    steps();
    draw();
    const close = () => { stop(); clearTimeout(patience); undo.forEach((act) => act()); if (Plotly) Plotly.purge(plot); };
    // Nobody answers any more: say so, and leave what the browser can do alone.
    const end = (message) => {
      say(message);
      clearTimeout(patience);
      talk = { ...talk, ask: null };
      figure.removeAttribute("aria-busy");
      form.querySelectorAll("input, select, button").forEach((one) => { one.disabled = true; });
    };
    return { ask, answer, end, close };
  };

  // Several views around one text: the text and a list of views above, the chosen view below. Views come from Python as they are opened.
  const mountApp = (host, spec, talk) => {
    const id = `cola-app-${++count}`, held = {};
    let view = null, open = null, opening = false, wanted = false;
    const text = make("input", { type: "text", id: `${id}-text`, name: "text" }), seed = make("input", { type: "number", id: `${id}-seed`, min: 0, max: 4294967295, step: 1 });
    text.value = spec.text; seed.value = spec.seed;
    const read = make("button", { type: "submit" }, "Read it");
    const looks = make("select", { id: `${id}-look` }, ...spec.looks.map(([name, label]) => make("option", { value: name }, label)));
    const status = make("p", { class: "cola-status", role: "status" }), panel = make("div", { class: "cola-panel" });
    const field = (label, input, wide) => make("label", { class: wide ? "cola-wide" : null, for: input.id }, make("span", {}, label), input);
    const form = make("form", { class: "cola-controls", "aria-label": "The text" }, field(spec.text_label, text, true), field("seed of the noise", seed), read, field("view", looks));
    const frame = make("section", { class: "cola-view cola-app", "aria-labelledby": `${id}-title` }, make("p", { class: "cola-title", id: `${id}-title` }, spec.title), make("p", { class: "cola-caption" }, spec.caption), form, status, panel);
    host.replaceChildren(frame);
    const shade = () => { frame.dataset.colaTheme = isDark() ? "dark" : "light"; };
    shade();
    held.undo = [whenThemeChanges(shade), keepKeys(form)]; // a view inside keeps its own
    const ask = () => {
      if (opening) { wanted = true; return; } // as in a view: one wish at a time, the last one counts
      if (!seed.checkValidity()) { status.textContent = `seed: ${seed.validationMessage}`; return; }
      opening = true;
      frame.setAttribute("aria-busy", "true");
      talk.ask({ view: id, open: looks.value, text: text.value, seed: Number(seed.value) });
    };
    const answer = (message) => {
      if (message.view !== id) { view?.answer(message); return; }
      opening = false;
      frame.removeAttribute("aria-busy");
      status.textContent = message.error ?? "";
      view?.close(); // it belongs to another text or look
      view = null;
      panel.replaceChildren();
      if (message.spec) {
        open = message.open;
        view = mount(panel, message.spec, { ...talk, ask: (wish) => talk.ask({ ...wish, look: open }) });
        view.ask();
      }
      if (wanted) { wanted = false; ask(); }
    };
    form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    looks.addEventListener("change", ask);
    const end = (message) => { status.textContent = message; frame.removeAttribute("aria-busy"); form.querySelectorAll("input, select, button").forEach((one) => { one.disabled = true; }); view?.end(""); };
    return { ask, answer, end, close: () => { held.undo.forEach((act) => act()); view?.close(); } };
  };
  const begin = (host, spec, talk) => (spec.looks ? mountApp : mount)(host, spec, talk);

  // Before a small server of our own: it answers, and holds the library.
  const serve = (host, spec) => {
    const read = async (address) => (await fetch(address)).text();
    const ask = async (message) => {
      try {
        const response = await fetch("ask", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message) });
        view.answer(await response.json());
      } catch (error) { view.end(`The program behind this page does not answer any more (${error.message}). Start it again and load the page anew.`); }
    };
    const sources = async () => ({ plotly: await read("plotly.min.js"), script: (await read("view.js")), style: await read("view.css") });
    const view = begin(host, spec, { plotly: async () => window.Plotly, ask, sources });
    view.ask();
  };

  // On a page: every still becomes a view. The library is on the page already.
  const awaken = (root) => {
    const library = [...document.scripts].find((one) => /plotly[^/]*\.js$/.test(one.src))?.src;
    const style = [...document.styleSheets].find((one) => /view\.css/.test(one.href ?? ""))?.href;
    const read = async (address) => (await fetch(address)).text();
    const sources = location.protocol.startsWith("http") && OWN && library && style
      ? async () => ({ plotly: await read(library), script: await read(OWN), style: await read(style) }) : null;
    for (const still of root.querySelectorAll(".cola-still")) {
      const spec = JSON.parse(still.querySelector("script").textContent);
      mount(still, spec, { plotly: async () => window.Plotly, ask: null, sources });
    }
  };

  // In a notebook: Python answers, and sends the library when the page does not have it yet.
  const library = (model) => {
    window.colaPlotly = window.colaPlotly ?? new Promise((resolve) => {
      const hear = (message, buffers) => {
        if (message.kind !== "plotly") return;
        model.off("msg:custom", hear);
        const code = new TextDecoder().decode(buffers[0].buffer ? new Uint8Array(buffers[0].buffer, buffers[0].byteOffset, buffers[0].byteLength) : buffers[0]);
        const { define, exports, module } = window; // an AMD or CommonJS loader on the page would swallow the library
        window.define = window.exports = window.module = undefined;
        const tag = make("script");
        tag.textContent = code;
        document.head.append(tag);
        tag.remove();
        Object.assign(window, { define, exports, module });
        resolve({ Plotly: window.Plotly, code });
      };
      model.on("msg:custom", hear);
      model.send({ kind: "plotly" });
    });
    return window.colaPlotly;
  };
  const render = ({ model, el }) => {
    const talk = {
      plotly: async () => (await library(model)).Plotly,
      ask: (message) => model.send(message),
      sources: async () => ({ plotly: (await library(model)).code, script: model.get("_esm").replace(/\nexport default .*\s*$/, ""), style: model.get("_css") }),
    };
    const view = begin(el, JSON.parse(model.get("spec")), talk);
    const hear = (message) => { if (message.kind === "answer") view.answer(JSON.parse(message.answer)); };
    const lost = () => view.end("The kernel behind this picture has stopped, so it no longer answers. Run this cell again, after those above it.");
    model.on("msg:custom", hear);
    model.on("comm_live_update", lost);
    // The picture for readers without a kernel stands before the view in the same output; two of the same would puzzle.
    const hide = () => {
      const child = el.closest(".jp-OutputArea-child"), before = child?.previousElementSibling;
      if (before?.querySelector("[data-mime-type='application/vnd.plotly.v1+json'], .jp-RenderedPlotly, .plotly-graph-div, .js-plotly-plot")) before.style.display = "none";
    };
    hide();
    const late = setTimeout(hide, 500);
    view.ask();
    return () => { clearTimeout(late); model.off("msg:custom", hear); model.off("comm_live_update", lost); view.close(); };
  };
  return { awaken, render, serve };
})();
