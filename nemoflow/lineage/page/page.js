"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const nodes = data.nodes;

  const STATES = {
    complete: ["#76b900", "finished and sealed"],
    running: ["#2f7de1", "being worked on"],
    stopped: ["#e0a72e", "begun, not finished, nobody works on it"],
    missing: ["#c9d0d9", "not made"],
  };
  const GROUP = 5; // alike artifacts from this many on are drawn as one
  const APART = 60; // the members of an expanded group that is larger are dots in a grid
  const WIDTH = 240, HEIGHT = 50, DOT = 18;

  nodes.forEach((node) => { node.consumers = []; });
  nodes.forEach((node, i) => node.inputs.forEach(([, from]) => nodes[from].consumers.push(i)));

  // -- what is drawn ------------------------------------------------------------------------------------------------

  // Artifacts of one kind and box that are consumed by the same ones are alike. Consumers come first, so that those of
  // a group are alike too: the shards of three thousand files are one node, and so are their sources.
  function arrange(expanded) {
    const level = new Array(nodes.length).fill(0);
    for (let i = nodes.length - 1; i >= 0; i--)
      for (const [, from] of nodes[i].inputs) level[from] = Math.max(level[from], level[i] + 1);
    const levels = [];
    level.forEach((depth, i) => (levels[depth] ||= []).push(i));
    const drawn = new Array(nodes.length); // the id under which an artifact is drawn
    const whole = new Array(nodes.length); // the same, or its group's where that is too large to take apart
    const groups = new Map();
    for (const members of levels) {
      const alike = new Map();
      for (const i of members) {
        const read = nodes[i].consumers.filter((c) => !nodes[c].inputs.some(([, from, behind]) => from === i && behind));
        const readers = [...new Set(read.map((c) => whole[c]))].sort();
        const id = ["group", nodes[i].box, nodes[i].kind, ...readers].join("|");
        if (!alike.has(id)) alike.set(id, []);
        alike.get(id).push(i);
      }
      for (const [id, found] of alike) {
        const group = found.length >= GROUP;
        const open = group && expanded.has(id);
        if (group) groups.set(id, { id, members: found, open, grid: open && found.length > APART });
        for (const i of found) {
          drawn[i] = group && !open ? id : "n" + i;
          whole[i] = group && (!open || found.length > APART) ? id : "n" + i;
        }
      }
    }
    return { drawn, whole, groups };
  }

  function stateOf(members) {
    const found = new Set(members.map((i) => nodes[i].state));
    return ["running", "stopped", "missing", "complete"].find((state) => found.has(state));
  }

  // "shards of web, job 3 of 90" and its siblings: what their titles have in common
  function common(members) {
    const titles = members.map((i) => nodes[i].title);
    if (titles.length === 1) return titles[0];
    let length = 0;
    const first = titles[0];
    while (length < first.length && titles.every((text) => text[length] === first[length])) length++;
    const kind = nodes[members[0]].kind;
    const shared = first.slice(0, length).replace(/,? job \d*$/, "").replace(/[\s\d,:.-]+$/, "");
    return shared.split(" ").length > 1 ? shared : kind;
  }

  function nameOf(group) {
    const done = group.members.filter((i) => nodes[i].state === "complete").length;
    const all = group.members.length;
    return `${common(group.members)}\n${done < all ? done.toLocaleString("en") + " of " : ""}${all.toLocaleString("en")} artifacts`;
  }

  const short = (text, limit) => (text.length > limit ? text.slice(0, limit - 1) + "…" : text);
  const captionOf = (node) => short(node.title, 38) + (node.said ? "\n" + short(node.said, 44) : "");

  // From top to bottom or from left to right: whichever lets more of it be read at once.
  function placeAll(layout) {
    const { clientWidth, clientHeight } = document.getElementById("graph");
    const scale = (rankdir) => {
      layout.setGraph({ rankdir, nodesep: 22, ranksep: 42, marginx: 20, marginy: 20 });
      dagre.layout(layout);
      const { width, height } = layout.graph();
      return Math.min(clientWidth / width, clientHeight / height);
    };
    const down = scale("TB");
    if (down < 1 && scale("LR") <= down) scale("TB");
  }

  // Places by dagre, in the boxes of stages; a grid of dots is one node to it.
  function elements(expanded) {
    const { drawn, whole, groups } = arrange(expanded);
    const layout = new dagre.graphlib.Graph({ compound: true });
    layout.setDefaultEdgeLabel(() => ({}));
    const found = [];
    const boxes = new Set(nodes.map((node) => node.box));
    const boxed = boxes.size > 1;
    if (boxed) for (const box of boxes) {
      layout.setNode("box" + box, {});
      found.push({ data: { id: "box" + box, label: data.boxes[box] }, classes: "box", selectable: false });
    }
    const parent = (node) => (boxed ? "box" + node.box : undefined);
    const place = (id, node, width, height) => {
      layout.setNode(id, { width, height });
      if (boxed) layout.setParent(id, "box" + node.box);
    };
    const grids = [];
    for (const group of groups.values()) {
      const node = nodes[group.members[0]];
      if (group.grid) {
        const columns = Math.ceil(Math.sqrt(group.members.length * 1.6));
        const rows = Math.ceil(group.members.length / columns);
        place(group.id, node, columns * DOT + 30, rows * DOT + 30);
        found.push({ data: { id: group.id, parent: parent(node), label: nameOf(group).replace("\n", " · ") }, classes: "grid" });
        grids.push({ group, columns, rows });
      } else if (!group.open) {
        place(group.id, node, WIDTH, HEIGHT);
        found.push({ data: { id: group.id, parent: parent(node), label: nameOf(group), colour: STATES[stateOf(group.members)][0] }, classes: "group" });
      }
    }
    nodes.forEach((node, i) => {
      if (drawn[i] !== "n" + i) return;
      const dot = whole[i] !== drawn[i];
      if (!dot) place("n" + i, node, WIDTH, HEIGHT);
      found.push({
        data: { id: "n" + i, parent: dot ? whole[i] : parent(node), label: dot ? "" : captionOf(node), colour: STATES[node.state][0] },
        classes: dot ? "dot" : "artifact",
      });
    });
    const edges = new Map();
    nodes.forEach((node, i) => {
      for (const [, from, behind] of node.inputs) {
        const [source, target] = [whole[from], whole[i]];
        const id = source + ">" + target;
        if (source === target) continue;
        if (!edges.has(id)) edges.set(id, { data: { id, source, target }, classes: "behind" });
        if (!behind) edges.get(id).classes = "";
      }
    });
    for (const edge of edges.values()) if (!edge.classes) layout.setEdge(edge.data.source, edge.data.target);
    placeAll(layout);
    const places = new Map(layout.nodes().map((id) => [id, layout.node(id)]));
    for (const { group, columns, rows } of grids) {
      const middle = places.get(group.id);
      group.members.forEach((i, k) => places.set("n" + i, {
        x: middle.x + ((k % columns) - (columns - 1) / 2) * DOT,
        y: middle.y + (Math.floor(k / columns) - (rows - 1) / 2) * DOT,
      }));
    }
    for (const element of found)
      if (element.classes !== "box" && element.classes !== "grid") {
        const { x, y } = places.get(element.data.id);
        element.position = { x, y };
      }
    return { found: [...found, ...edges.values()], drawn, whole, groups };
  }

  const cy = cytoscape({
    container: document.getElementById("graph"),
    minZoom: 0.02,
    maxZoom: 3,
    boxSelectionEnabled: false,
    autoungrabify: true,
    style: [
      { selector: "node", style: { "font-family": "system-ui, DejaVu Sans, sans-serif", "font-size": 11, color: "#1d2530" } },
      { selector: ".artifact, .group", style: {
        shape: "round-rectangle", width: WIDTH, height: HEIGHT, "background-color": "#fff", "border-width": 2.5,
        "border-color": "data(colour)", label: "data(label)", "text-valign": "center", "text-halign": "center",
        "text-wrap": "wrap", "text-max-width": WIDTH - 12, "line-height": 1.3 } },
      { selector: ".group", style: { "border-style": "double", "border-width": 7, "font-weight": "bold" } },
      { selector: ".dot", style: { width: 12, height: 12, "background-color": "data(colour)" } },
      { selector: ".box, .grid", style: {
        shape: "round-rectangle", "background-color": "#e8ecf1", "background-opacity": 0.55, "border-width": 0, label: "data(label)",
        "text-valign": "top", "text-halign": "center", "font-size": 14, "font-weight": "bold", color: "#5a6675", padding: 16 } },
      { selector: ".grid", style: { "background-color": "#fff", "border-width": 1, "border-color": "#c3cad4", "font-size": 12, padding: 8 } },
      { selector: "edge", style: {
        width: 1.4, "line-color": "#9aa5b3", "target-arrow-color": "#9aa5b3", "target-arrow-shape": "triangle",
        "arrow-scale": 0.8, "curve-style": "bezier" } },
      { selector: "edge.behind", style: { display: "none", "line-style": "dashed" } },
      { selector: "node.faded", style: { opacity: 0.4 } },
      { selector: ".box.faded", style: { opacity: 1 } },
      { selector: "edge.faded", style: { opacity: 0.12 } },
      { selector: "edge.behind.up, edge.behind.down", style: { display: "element" } },
      { selector: "edge.up", style: { "line-color": "#2f7de1", "target-arrow-color": "#2f7de1", width: 2.4 } },
      { selector: "edge.down", style: { "line-color": "#c65d3b", "target-arrow-color": "#c65d3b", width: 2.4 } },
      { selector: ".artifact.chosen, .group.chosen", style: { "background-color": "#eaf3d8" } },
      { selector: ".dot.chosen", style: { width: 18, height: 18, "border-width": 3, "border-color": "#1d2530" } },
    ],
  });

  const expanded = new Set();
  let view;
  let chosen = null; // {members: indices, group: id or null}
  let direction = "both";

  function draw(fit) {
    view = elements(expanded);
    cy.batch(() => { cy.elements().remove(); cy.add(view.found); });
    highlight();
    if (fit) cy.fit(undefined, 30);
  }

  function closure(start, next) {
    const seen = new Set(start);
    const left = [...start];
    while (left.length) for (const i of next(nodes[left.pop()])) if (!seen.has(i)) { seen.add(i); left.push(i); }
    return seen;
  }

  function around(members) {
    return {
      up: direction === "down" ? new Set(members) : closure(members, (node) => node.inputs.map(([, from]) => from)),
      down: direction === "up" ? new Set(members) : closure(members, (node) => node.consumers),
    };
  }

  function highlight() {
    cy.batch(() => {
      cy.elements().removeClass("faded up down chosen");
      if (!chosen) return;
      const { up, down } = around(chosen.members);
      const ids = (found) => new Set([...found].flatMap((i) => [view.drawn[i], view.whole[i]]));
      const [above, below, own] = [ids(up), ids(down), ids(chosen.members)];
      cy.nodes().forEach((node) => { node.toggleClass("faded", !above.has(node.id()) && !below.has(node.id())); });
      cy.edges().forEach((edge) => {
        const both = (found) => found.has(edge.source().id()) && found.has(edge.target().id());
        edge.addClass(both(above) ? "up" : both(below) ? "down" : "faded");
      });
      for (const id of own) cy.getElementById(id).addClass("chosen");
    });
  }

  // -- the panel ----------------------------------------------------------------------------------------------------

  const panel = document.getElementById("panel");

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes))
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const number = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(6))));
  function human(count) {
    for (const unit of ["B", "kB", "MB", "GB"]) {
      if (count < 1000) return `${unit === "B" ? count : count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(1)} TB`;
  }
  function duration(seconds) {
    return seconds < 120 ? `${seconds.toFixed(0)} s` : seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }
  const dot = (state) => make("span", { class: "dot", style: `background:${STATES[state][0]}` });
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  function table(rows) {
    return make("table", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell, k) =>
      cell instanceof Node ? make("td", {}, cell) : make(k ? "td" : "th", {}, String(cell))))));
  }

  // {"optimizer": {"lr": 1}} as rows "optimizer.lr", 1
  function flat(value, prefix = "") {
    if (value === null || typeof value !== "object") return [[prefix, typeof value === "number" ? number(value) : String(value)]];
    if (Array.isArray(value) && value.every((item) => item === null || typeof item !== "object"))
      return [[prefix, value.map((item) => (typeof item === "number" ? number(item) : String(item))).join(", ")]];
    return Object.entries(value).flatMap(([name, item]) => flat(item, prefix ? `${prefix}.${name}` : name));
  }

  function link(i, before = "") {
    const node = nodes[i];
    const open = () => choose([i]);
    return make("a", { tabindex: 0, "data-key": node.key, onclick: open, onkeydown: (event) => event.key === "Enter" && open() },
      dot(node.state), before ? make("small", {}, before + " ") : null, node.title, node.said ? make("small", {}, " · " + node.said) : null);
  }

  function links(members, before) {
    const limit = 300;
    const found = members.slice(0, limit).map((i, k) => link(i, before && before[k]));
    if (members.length > limit) found.push(make("p", { class: "quiet" }, `… ${(members.length - limit).toLocaleString("en")} more; find them above`));
    return found;
  }

  function section(title, ...children) {
    const shown = children.filter((child) => child !== null);
    return shown.length ? [make("h3", {}, title), ...shown] : [];
  }

  const COLOURS = { loss: "#5b7fa6", valid_loss: "#c65d3b", reward: "#76b900" };
  function curve(names, curves) {
    const series = names.filter((name) => curves[name] && curves[name].length > 1);
    if (!series.length) return null;
    const [w, h, left, bottom, top] = [380, 170, 44, 20, 20];
    const all = series.flatMap((name) => curves[name]);
    const [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
    const [y0, y1] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
    const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (w - left - 8);
    const y = (v) => h - bottom - ((v - y0) / (y1 - y0 || 1)) * (h - bottom - top);
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.setAttribute("class", "curve");
    const add = (tag, attributes, text) => {
      const element = document.createElementNS(ns, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text) element.textContent = text;
      svg.append(element);
    };
    add("path", { d: `M${left},${top}V${h - bottom}H${w - 8}`, fill: "none", stroke: "#c3cad4" });
    add("text", { x: left - 5, y: h - bottom, "text-anchor": "end" }, y0.toPrecision(3));
    add("text", { x: left - 5, y: top + 9, "text-anchor": "end" }, y1.toPrecision(3));
    add("text", { x: left, y: h - 5 }, number(x0));
    add("text", { x: w - 8, y: h - 5, "text-anchor": "end" }, "iteration " + number(x1));
    series.forEach((name, k) => {
      add("path", { d: "M" + curves[name].map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("L"), fill: "none", stroke: COLOURS[name], "stroke-width": 1.6, "data-curve": name });
      add("text", { x: left + 8 + k * 110, y: 11, style: `fill:${COLOURS[name]}` }, name.replace("_", " "));
    });
    return svg;
  }

  function attempt(found) {
    const rows = [["started", found.started || ""], ["took", found.seconds !== undefined ? duration(found.seconds) : "not known"]];
    const name = { slurm_job: "Slurm job", gpu_hours: "GPU-hours" };
    for (const [key, value] of Object.entries(found))
      if (!["number", "started", "ended", "seconds", "outcome", "command"].includes(key)) rows.push(...flat(value, name[key] || key));
    return make("details", {}, make("summary", {}, `${found.number}: ${found.outcome || "no end recorded"}`), table(rows),
      found.command ? make("pre", {}, found.command.join(" ")) : null);
  }

  function directions() {
    return make("div", { class: "row" }, ...[["up", "upstream"], ["down", "downstream"], ["both", "both"]].map(([value, text]) =>
      make("button", { "data-direction": value, "aria-pressed": direction === value, onclick: () => { direction = value; choose(chosen.members, chosen.group); } }, text)));
  }

  function gpuHours(found) {
    const values = found.map((a) => a.gpu_hours).filter((value) => typeof value === "number");
    return values.length ? sum(values) : null;
  }

  function showArtifact(i) {
    const node = nodes[i];
    const hours = gpuHours(node.attempts);
    const target = / of (\S+?)(@(\S+))?( to (\d+))?$/.exec(node.title);
    const { up, down } = around([i]);
    panel.replaceChildren(
      make("h2", {}, node.title),
      make("div", {}, dot(node.state), `${node.state}: ${STATES[node.state][1]}`),
      table([
        ["kind", node.kind], ["label", node.label], ["identity", make("code", {}, node.key)], ["path", make("code", {}, node.path)],
        ...(node.tokens === null ? [] : [["tokens", number(node.tokens)]]),
        ...(node.attempts.length ? [["time", duration(sum(node.attempts.map((a) => a.seconds || 0)))]] : []),
        ...(hours === null ? [] : [["GPU-hours", number(hours)]]),
      ]),
      directions(),
      make("p", { class: "quiet" }, `${(up.size - 1).toLocaleString("en")} upstream, ${(down.size - 1).toLocaleString("en")} downstream`),
      ...section("Curves", curve(["loss", "valid_loss"], node.curves), curve(["reward"], node.curves)),
      ...section("Measures", flat(node.measures).length ? table(flat(node.measures)) : null),
      ...section("Settings", flat(node.payload).length ? table(flat(node.payload)) : null),
      ...section("Inputs", ...links(node.inputs.map(([, from]) => from), node.inputs.map(([role]) => role))),
      ...section("Made from it", ...links([...new Set(node.consumers)])),
      ...section(`Files${node.count ? `: ${node.count.toLocaleString("en")}, ${human(node.bytes)}` : ""}`, ...node.files.map(([name, size, digest]) =>
        make("div", {}, make("code", {}, name), make("small", {}, ` ${human(size)}`), digest ? make("div", {}, make("small", {}, make("code", {}, digest))) : null)),
        node.count > node.files.length ? make("p", { class: "quiet" }, `… ${(node.count - node.files.length).toLocaleString("en")} more in artifact.json`) : null),
      ...section("Attempts", ...[...node.attempts].reverse().map(attempt)),
      ...section("Commands", make("pre", {}, [
        ...(target && ["pretrain", "sft", "rl", "hf_export", "import", "average", "select"].includes(node.kind) ? [`snakemake ${node.kind}/${target[1]}${stage(node, target)}${target[5] ? ":" + target[5] : ""}`] : []),
        `nemoflow trace ${node.path}`, `nemoflow verify --deep ${node.path}`].join("\n"))),
    );
  }

  // "pretrain phase1 of nano3 to 90" is asked for as pretrain/nano3@phase1:90
  function stage(node, target) {
    if (target[3]) return "@" + target[3];
    const words = node.title.slice(0, node.title.indexOf(" of ")).split(" ");
    return "@" + words[words.length - 1];
  }

  function showGroup(members, group) {
    const open = expanded.has(group);
    panel.replaceChildren(
      make("h2", {}, common(members)),
      make("p", { class: "quiet" }, `${members.length.toLocaleString("en")} artifacts that the same ones are made from`),
      make("div", { class: "row" }, make("button", { id: "toggle", onclick: () => toggle(group) }, open ? "collapse" : "expand")),
      directions(),
      ...section("Together", table([
        ...["complete", "running", "stopped", "missing"].map((state) => [state, members.filter((i) => nodes[i].state === state).length]).filter(([, count]) => count).map(([state, count]) => [state, number(count)]),
        ["tokens", number(sum(members.map((i) => nodes[i].tokens || 0)))], ["files", number(sum(members.map((i) => nodes[i].count)))],
        ["size", human(sum(members.map((i) => nodes[i].bytes)))]])),
      ...section("Members", ...links(members)),
    );
  }

  function showAll(members = nodes.map((_, i) => i), title = "Artifacts") {
    const boxes = new Map();
    for (const i of members) {
      if (!boxes.has(nodes[i].box)) boxes.set(nodes[i].box, []);
      boxes.get(nodes[i].box).push(i);
    }
    const runs = new Map(nodes.map((node) => [node.key.split(":")[0], node.attempts]));
    const hours = gpuHours([...runs.values()].flat());
    panel.replaceChildren(
      make("h2", {}, title),
      make("p", { class: "quiet" }, `${members.length.toLocaleString("en")} artifacts${hours === null ? "" : `, ${number(hours)} GPU-hours`}. Click one, here or in the graph.`),
      ...[...boxes].flatMap(([box, found]) => section(data.boxes[box], ...links(found))),
    );
  }

  function toggle(group) {
    const members = view.groups.get(group).members;
    expanded.has(group) ? expanded.delete(group) : expanded.add(group);
    draw(true);
    choose(members, group);
  }

  function choose(members, group = null) {
    chosen = members ? { members, group } : null;
    highlight();
    panel.scrollTop = 0;
    if (!members) showAll();
    else if (group) showGroup(members, group);
    else showArtifact(members[0]);
  }

  // -- hands --------------------------------------------------------------------------------------------------------

  cy.on("tap", (event) => {
    if (event.target === cy || event.target.isEdge?.() || event.target.hasClass("box")) return choose(null);
    const id = event.target.id();
    return view.groups.has(id) ? choose(view.groups.get(id).members, id) : choose([Number(id.slice(1))]);
  });
  cy.on("dbltap", "node", (event) => { if (view.groups.has(event.target.id())) toggle(event.target.id()); });
  document.getElementById("fit").addEventListener("click", () => cy.fit(undefined, 30));
  document.getElementById("close").addEventListener("click", () => { expanded.clear(); choose(null); draw(true); });
  document.getElementById("open").addEventListener("click", () => {
    let before = -1;
    while (before !== expanded.size) { // groups of an expanded group's inputs appear with it
      before = expanded.size;
      for (const id of arrange(expanded).groups.keys()) expanded.add(id);
    }
    choose(null);
    draw(true);
  });
  document.getElementById("search").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    chosen = null;
    highlight();
    if (!words.length) return showAll();
    const found = nodes.map((_, i) => i).filter((i) => {
      const text = `${nodes[i].title} ${nodes[i].kind} ${nodes[i].label} ${nodes[i].key}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    return showAll(found, `${found.length.toLocaleString("en")} found`);
  });
  const counts = new Map(Object.keys(STATES).map((state) => [state, nodes.filter((node) => node.state === state).length]));
  document.getElementById("legend").append(...[...counts].filter(([, count]) => count).map(([state, count]) =>
    make("span", { title: STATES[state][1] }, dot(state), `${count.toLocaleString("en")} ${state}`)));

  showAll();
  draw(true);
  window.lineage = { cy, choose, toggle }; // for the console, and for tests
})();
