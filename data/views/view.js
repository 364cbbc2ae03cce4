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
    const { classList } = document.body; // of VS Code
    if (classList.contains("vscode-light") || classList.contains("vscode-high-contrast-light")) return false;
    if (classList.contains("vscode-dark") || classList.contains("vscode-high-contrast")) return true;
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

  const decimals = (step) => { // that a step has: 2 of 0.25, 7 of 1e-7
    const [digits, power = 0] = String(step).split("e");
    return Math.max(0, (digits.split(".")[1] ?? "").length - Number(power));
  };
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

  const fresh = (kind) => `${kind}-${Math.random().toString(36).slice(2, 10)}`; // each widget of a notebook loads this script anew, so counting would not do
  const labelled = (text, input, wide, ...more) => make("label", { class: wide ? "cola-wide" : null, for: input.id }, make("span", {}, text), input, ...more);
  const disable = (form) => form.querySelectorAll("input, select, button").forEach((one) => { one.disabled = true; });
  const fetched = async (address, options) => {
    const response = await fetch(address, options);
    if (!response.ok) throw new Error(`${address}: ${response.status} ${await response.text()}`);
    return response;
  };
  const read = async (address) => (await fetched(address)).text();

  // Puts a view into `host`. `talk`: plotly() gives a promise of the drawing library; ask(message) asks Python, null where there is none;
  // sources() gives a promise of the texts that a page of its own needs, null where they cannot be had.
  const mount = (host, spec, talk) => {
    const id = fresh("cola"), values = {}, inputs = {}, undo = [];
    let picture = spec.picture ?? null, step = picture?.start ?? 0, playing = null, drawing = false, again = false, Plotly = null;
    let waiting = false, wanted = false, patience = null; // for an answer; another is to be asked for then
    const presses = new Set(), newer = new Set(); // since the wish that is on its way: buttons pressed, values changed
    const late = {}; // controls that came for one which the reader was holding
    let heldName = null, ranges = "", shown = null, faulty = "", closed = false;

    const title = make("p", { class: "cola-title", id: `${id}-title` }, spec.title);
    const form = make("div", { class: "cola-controls", role: "group", "aria-label": "Controls" });
    const player = make("div", { class: "cola-controls", role: "group", "aria-label": "Steps" });
    const plot = make("div", { class: "cola-plot", "aria-describedby": `${id}-caption` });
    const text = make("div", { class: "cola-text", "aria-live": "polite" });
    const status = make("p", { class: "cola-status", role: "status" });
    const spoken = make("p", { class: "cola-spoken", role: "status" }); // where the cursor is: the others see it
    const caption = make("figcaption", { class: "cola-caption", id: `${id}-caption` }, spec.caption);
    const tools = make("div", { class: "cola-tools", role: "group", "aria-label": "Save the picture" });
    const figure = make("figure", { class: "cola-view", role: "group", "aria-labelledby": `${id}-title`, "data-cola-view": id });
    figure.append(title, form, player, plot, text, status, spoken, caption, tools);
    host.replaceChildren(figure);

    const say = (message) => { status.textContent = message; };
    const ask = (pressed = null) => {
      if (!talk.ask) return;
      if (pressed) { presses.delete(pressed); presses.add(pressed); } // the last press is the last to be told
      if (waiting) { wanted = true; return; } // asked when the answer is here: the last value wins, no value queues
      const [first = null] = presses;
      presses.delete(first);
      waiting = true;
      wanted = presses.size > 0;
      newer.clear();
      figure.setAttribute("aria-busy", "true");
      talk.ask({ view: id, values, pressed: first });
      clearTimeout(patience);
      patience = setTimeout(() => say("Python has not answered for 20 seconds. Is the kernel busy with another cell? If it was stopped, run this cell again."), PATIENCE);
    };
    // An answer is for one view; what comes unasked, from a view that changes by itself, is for all.
    const answer = (message) => {
      if (message.view && message.view !== id) return;
      const pushed = !message.view;
      if (!pushed) {
        waiting = false;
        clearTimeout(patience);
        figure.removeAttribute("aria-busy");
      }
      if (message.error) say(message.error);
      else if (!pushed || status.textContent === faulty) say(""); // what an answer has said, no push takes away
      faulty = pushed && message.error ? message.error : "";
      if (!message.error) take(message.picture, pushed && waiting);
      if (!waiting && wanted) ask();
    };
    const take = (news, older) => {
      const before = (picture?.figure.frames ?? []).length;
      picture = news;
      const frames = (picture.figure.frames ?? []).length;
      if (frames !== before) step = picture.start;
      step = Math.min(Math.max(step, 0), Math.max(frames - 1, 0));
      if (!older) for (const control of picture.controls) accept(control); // older than the values that are on their way: not to be heeded
      steps();
      draw();
    };
    // The picture's word on a control counts, but not against what the reader has changed since, nor under a finger.
    const accept = (control, own = newer.has(control.name)) => {
      const { name, kind } = control;
      if (kind === "hidden" && !own) values[name] = control.value;
      if (kind === "hidden" || inputs[name]?.cola.typing()) return;
      if (name === heldName) { late[name] = control; return; }
      const { value } = own && isPossible(control, values[name]) ? { value: values[name] } : control;
      values[name] = value;
      put({ ...control, value });
    };
    const isPossible = ({ kind, options, low, high }, value) => {
      if (kind === "choice") return options.some(([, known]) => known === value);
      return kind !== "slider" && kind !== "number" || low <= value && value <= high;
    };
    const release = () => {
      heldName = null;
      for (const control of Object.values(late)) { delete late[control.name]; accept(control, true); }
    };
    for (const kind of ["pointerup", "pointercancel"]) {
      window.addEventListener(kind, release);
      undo.push(() => window.removeEventListener(kind, release));
    }

    // Controls: native ones, so that keys, names and touch come with the browser.
    const put = (control) => {
      const made = JSON.stringify({ ...control, value: null }), old = inputs[control.name];
      if (old?.cola.made === made) { old.cola.set(control.value); return; } // the same control: an open list and the focus stay
      const input = field(control, `${id}-${control.name}`), slides = control.kind === "slider", typed = control.kind === "text" || control.kind === "number";
      const output = make("output", { for: input.id, "aria-live": "off" }); // a slider says its value itself
      const label = control.kind === "button" ? input : labelled(control.label, input, slides || control.kind === "text", ...(slides ? [output] : []));
      const show = () => { output.textContent = Number(input.value).toFixed(decimals(control.step)); };
      const read = () => {
        if (control.kind === "choice") return control.options[Number(input.value)][1];
        if (control.kind === "toggle") return input.checked;
        return control.kind === "text" ? input.value : Number(input.value);
      };
      const set = (value) => {
        if (control.kind === "choice") input.value = control.options.findIndex(([, known]) => known === value);
        else if (control.kind === "toggle") input.checked = value;
        else if (control.kind !== "button") input.value = value;
        show();
      };
      const typing = () => typed && input === document.activeElement && (read() !== values[control.name] || input.value === "");
      let complaint = "";
      const moved = () => {
        if (complaint && status.textContent === complaint) say("");
        complaint = "";
        if (control.kind === "number" && (input.value === "" || !input.checkValidity())) { say(complaint = `${control.label}: ${input.validationMessage || "give a number"}`); return; }
        if (typed && values[control.name] === read()) return; // Enter has told it already
        change(control.name, read()); show(); ask();
      };
      if (control.kind === "button") input.addEventListener("click", () => ask(control.name));
      else input.addEventListener(slides ? "input" : "change", moved);
      if (slides) input.addEventListener("pointerdown", () => { heldName = control.name; });
      // Enter means: take it. Neither every browser nor every notebook around lets the key do so by itself.
      if (typed) input.addEventListener("keydown", (event) => { if (event.key === "Enter") moved(); });
      set(control.value);
      label.cola = { input, made, set, typing };
      const focused = old?.contains(document.activeElement);
      if (old) old.replaceWith(label);
      else form.append(label);
      inputs[control.name] = label;
      if (focused) input.focus({ preventScroll: true });
    };
    const change = (name, value) => { values[name] = value; newer.add(name); };
    for (const control of spec.controls) { values[control.name] = control.value; if (control.kind !== "hidden") put(control); }

    // Steps: they live in the browser, so that a slider and a button move them at once.
    const play = make("button", { type: "button" }, "Play");
    const scrub = make("input", { type: "range", id: `${id}-step`, min: 0, step: 1, value: 0 });
    const where = make("output", { for: `${id}-step`, "aria-live": "off" }), line = labelled("", scrub, true, where), named = line.firstChild;
    player.append(play, line);
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
    const stop = () => { clearInterval(playing); playing = null; play.textContent = "Play"; text.setAttribute("aria-live", "polite"); };
    scrub.addEventListener("input", () => { stop(); go(Number(scrub.value)); });
    play.addEventListener("click", () => {
      if (playing) { stop(); return; }
      const last = () => (picture?.figure.frames ?? []).length - 1; // a new picture may have fewer
      if (step >= last()) go(0);
      play.textContent = "Pause";
      text.setAttribute("aria-live", "off"); // nobody could follow
      playing = setInterval(() => { if (step >= last() || !figure.isConnected) stop(); else go(step + 1); }, 300);
    });

    // Drawing: never two at once, and the last wish is always drawn.
    const draw = async () => {
      if (drawing) { again = true; return; }
      drawing = true;
      try {
        do {
          again = false;
          const dark = isDark();
          figure.dataset.colaTheme = dark ? "dark" : "light";
          Plotly = Plotly ?? await talk.plotly();
          const width = figure.clientWidth;
          if (!picture || closed || !width) break; // no width: hidden: the observer below draws when it is shown
          const { data, layout } = composed(picture, step, dark, width), drawn = step;
          // An axis whose domain gives way to keep its scale would hold on to its first range: with another one, begin anew.
          const limits = JSON.stringify(Object.values(layout).filter((axis) => axis?.constrain === "domain").map((axis) => axis.range));
          if (limits !== ranges && ranges) Plotly.purge(plot);
          ranges = limits;
          await Plotly.react(plot, data, layout, CONFIG);
          const words = Array.isArray(picture.texts) ? picture.texts[Math.min(step, picture.texts.length - 1)] ?? "" : picture.texts;
          if (shown !== words) { text.innerHTML = words; shown = words; }
          if (spec.pointer) showCursor();
          else { plot.setAttribute("role", "img"); plot.setAttribute("aria-label", `${spec.title}. ${picture.alt || spec.caption}`); }
          figure.dataset.colaDrawn = `${drawn}`;
        } while (again);
      } catch (error) {
        if (closed) return; // before the library came
        say(`The picture could not be drawn: ${error.message}`);
        throw error;
      } finally { drawing = false; }
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
          const { input, set } = inputs[name].cola;
          const possible = Math.min(Math.max(at[i], Number(input.min)), Number(input.max));
          change(name, Number(possible.toFixed(decimals(input.step)))); set(values[name]);
        });
        ask();
      } else if (kind === "paint") {
        const [column, row] = at.map(Math.round), cells = values[names[0]];
        if (cells[row]?.[column] === undefined) return;
        pen = pen ?? { paint: cells[row][column] ? 0 : 1 };
        if (cells[row][column] === pen.paint) return;
        cells[row][column] = pen.paint;
        newer.add(names[0]);
        spoken.textContent = `row ${row}, column ${column}: ${pen.paint ? "on" : "off"}`;
        ask();
      } else pen = pen ?? { from: at };
    };
    const rub = (at) => {
      if (spec.pointer.kind !== "stroke") { pressAt(at); return; }
      if (!pen) return; // Escape has taken it
      const [from, to] = [pen.from, at].map(toPixels), space = "http://www.w3.org/2000/svg";
      const svg = plot.querySelector(".cola-stroke") ?? plot.appendChild(document.createElementNS(space, "svg"));
      svg.setAttribute("class", "cola-stroke");
      const line = svg.firstChild ?? svg.appendChild(document.createElementNS(space, "line"));
      [["x1", from[0]], ["y1", from[1]], ["x2", to[0]], ["y2", to[1]]].forEach(([name, value]) => line.setAttribute(name, value));
    };
    const drop = () => { plot.querySelector(".cola-stroke")?.remove(); pen = null; };
    const lift = (at) => {
      if (pen?.from) {
        const [name] = spec.pointer.names;
        change(name, [...values[name], [...pen.from, at[0] - pen.from[0], at[1] - pen.from[1]]]);
        ask();
      }
      drop();
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
        if (event.button !== 0 || !talk.ask || !plot._fullLayout?.xaxis) return;
        const { at, inside } = toData(event);
        if (!inside) return;
        event.stopPropagation();
        plot.setPointerCapture(event.pointerId);
        plot.focus({ preventScroll: true });
        down = true; cursor = null; ring.remove(); pen = null;
        pressAt(at);
      }, true);
      plot.addEventListener("pointermove", (event) => { if (down) { event.stopPropagation(); rub(toData(event).at); } }, true);
      plot.addEventListener("pointerup", (event) => { if (down) { down = false; lift(toData(event).at); } }, true);
      plot.addEventListener("pointercancel", () => { down = false; drop(); }, true); // the browser takes the gesture: nothing was meant
      plot.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
        const move = moves[event.key];
        if (!move && event.key !== " " && event.key !== "Enter" && event.key !== "Escape") return;
        if (event.ctrlKey || event.metaKey || event.altKey || !talk.ask || !plot._fullLayout?.xaxis) return;
        const [x, y] = axes();
        event.preventDefault(); event.stopPropagation();
        const ends = [x, y].map((axis) => [...axis.range].sort((a, b) => a - b));
        const kind = spec.pointer.kind;
        cursor = cursor ?? (kind === "drag" ? spec.pointer.names.map((name) => values[name]) : ends.map(([low, high]) => (kind === "paint" ? Math.round((low + high) / 2) : (low + high) / 2)));
        if (event.key === "Escape") { down = false; drop(); }
        else if (move) {
          const size = ends.map(([low, high]) => (kind === "paint" ? 1 : (high - low) / (event.shiftKey ? 100 : 25)));
          const turned = [x, y].map((axis) => (axis.range[0] > axis.range[1] ? -1 : 1));
          cursor = cursor.map((value, i) => Math.min(Math.max(value + move[i] * turned[i] * size[i], ends[i][0]), ends[i][1]));
          if (kind === "paint") cursor = cursor.map(Math.round);
          spoken.textContent = `cursor at ${cursor.map((value) => Number(value.toPrecision(3))).join(", ")}`;
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
        if (!picture) return;
        let parts;
        try { parts = await talk.sources(); }
        catch (error) { say(`The page could not be saved: ${error.message}`); return; }
        const { plotly, script, style } = parts;
        const still = { title: spec.title, caption: spec.caption, controls: [], picture: { ...picture, start: step, controls: [] } };
        const safe = (code) => code.replace(/<\/(script)/gi, "<\\/$1");
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
    const close = () => { closed = true; stop(); clearTimeout(patience); undo.forEach((act) => act()); if (Plotly) Plotly.purge(plot); };
    // Nobody answers any more: say so, and leave what the browser can do alone.
    const end = (message) => {
      say(message);
      clearTimeout(patience);
      talk = { ...talk, ask: null };
      figure.removeAttribute("aria-busy");
      disable(form);
    };
    return { ask, answer, end, close };
  };

  // Several views around one text: the text and a list of views above, the chosen view below. Views come from Python as they are opened.
  const mountApp = (host, spec, talk) => {
    const id = fresh("cola-app");
    let view = null, opening = false, wanted = false, patience = null;
    const text = make("input", { type: "text", id: `${id}-text`, name: "text" }), seed = make("input", { type: "number", id: `${id}-seed`, min: 0, max: 4294967295, step: 1 });
    text.value = spec.text; seed.value = spec.seed;
    const submit = make("button", { type: "submit" }, "Read it");
    const looks = make("select", { id: `${id}-look` }, ...spec.looks.map(([name, label]) => make("option", { value: name }, label)));
    const status = make("p", { class: "cola-status", role: "status" }), panel = make("div", { class: "cola-panel" });
    const form = make("form", { class: "cola-controls", "aria-label": "The text" }, labelled(spec.text_label, text, true), labelled("seed of the noise", seed), submit, labelled("view", looks));
    const frame = make("section", { class: "cola-view cola-app", "aria-labelledby": `${id}-title` }, make("p", { class: "cola-title", id: `${id}-title` }, spec.title), make("p", { class: "cola-caption" }, spec.caption), form, status, panel);
    host.replaceChildren(frame);
    const shade = () => { frame.dataset.colaTheme = isDark() ? "dark" : "light"; };
    shade();
    const undo = [whenThemeChanges(shade), keepKeys(form)]; // a view inside keeps its own
    const ask = () => {
      if (opening) { wanted = true; return; } // as in a view: one wish at a time, the last one counts
      if (seed.value === "" || !seed.checkValidity()) { status.textContent = `seed: ${seed.validationMessage || "give a number"}`; return; }
      opening = true;
      frame.setAttribute("aria-busy", "true");
      talk.ask({ view: id, open: looks.value, text: text.value, seed: Number(seed.value) });
      patience = setTimeout(() => { status.textContent = "Python has not answered for 20 seconds. It may still be at work on another wish."; }, PATIENCE);
    };
    const answer = (message) => {
      if (message.view !== id) { view?.answer(message); return; }
      opening = false;
      clearTimeout(patience);
      frame.removeAttribute("aria-busy");
      status.textContent = message.error ?? "";
      if (message.spec) {
        view?.close();
        const { open: look, text, seed } = message; // so that no wish reaches the view of another text
        view = mount(panel, message.spec, { ...talk, ask: (wish) => talk.ask({ ...wish, look, text, seed }) }); // its picture comes with it
      }
      if (wanted) { wanted = false; ask(); }
    };
    form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    looks.addEventListener("change", ask);
    const end = (message) => { status.textContent = message; clearTimeout(patience); frame.removeAttribute("aria-busy"); disable(form); view?.end(""); };
    return { ask, answer, end, close: () => { clearTimeout(patience); undo.forEach((act) => act()); view?.close(); } };
  };
  const begin = (host, spec, talk) => (spec.looks ? mountApp : mount)(host, spec, talk);

  // Before a small server of our own: it answers, and holds the library.
  const serve = (host, spec) => {
    const ask = async (message) => {
      let answer;
      try { answer = await (await fetched("ask", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message) })).json(); }
      catch (error) { view.end(`The program behind this page does not answer any more (${error.message}). Start it again and load the page anew.`); return; }
      view.answer(answer);
    };
    const sources = async () => ({ plotly: await read("plotly.min.js"), script: await read("view.js"), style: await read("view.css") });
    const view = begin(host, spec, { plotly: async () => window.Plotly, ask, sources });
    view.ask();
  };

  // On a page: every still becomes a view. The library is on the page already.
  const awaken = (root) => {
    const library = [...document.scripts].find((one) => /plotly[^/]*\.js(\?|$)/.test(one.src))?.src;
    const style = [...document.styleSheets].find((one) => /view\.css/.test(one.href ?? ""))?.href;
    const sources = location.protocol.startsWith("http") && OWN && library && style
      ? async () => ({ plotly: await read(library), script: await read(OWN), style: await read(style) }) : null;
    for (const still of root.querySelectorAll(".cola-still")) {
      const spec = JSON.parse(still.querySelector("script").textContent);
      mount(still, spec, { plotly: async () => window.Plotly, ask: null, sources });
    }
  };

  // In a notebook: Python answers, and sends the library when the page does not have it yet.
  const fetchLibrary = (model) => {
    let stop = null;
    const library = new Promise((resolve, reject) => { stop = reject; hearLibrary(model, resolve); });
    return { model, library, stop: () => stop(new Error("the kernel has stopped before it could send the drawing library")) };
  };
  const hearLibrary = (model, resolve) => {
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
  };
  // One of the page's views asks for all; if it goes before the answer comes, the next one asks.
  const library = async (model) => {
    for (;;) {
      const asked = window.colaPlotly = window.colaPlotly ?? fetchLibrary(model);
      try { return await asked.library; }
      catch (error) {
        if (window.colaPlotly === asked) window.colaPlotly = undefined;
        if (asked.model === model) throw error;
      }
    }
  };
  const render = ({ model, el }) => {
    const talk = {
      plotly: async () => (await library(model)).Plotly,
      ask: (message) => model.send(message),
      sources: async () => ({ plotly: (await library(model)).code, script: model.get("_esm").replace(/\nexport default .*\s*$/, ""), style: model.get("_css") }),
    };
    const view = begin(el, JSON.parse(model.get("spec")), talk);
    const hear = (message) => { if (message.kind === "answer") view.answer(JSON.parse(message.answer)); };
    const noLibrary = () => { if (window.colaPlotly?.model === model) window.colaPlotly.stop(); }; // nothing, once it is here
    const lost = () => { noLibrary(); view.end("The kernel behind this picture has stopped, so it no longer answers. Run this cell again, after those above it."); };
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
    return () => { clearTimeout(late); model.off("msg:custom", hear); model.off("comm_live_update", lost); view.close(); noLibrary(); };
  };
  return { awaken, render, serve };
})();
