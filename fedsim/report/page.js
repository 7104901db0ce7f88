"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  let printing = false;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), muted: read("--muted"), line: read("--line"), card: read("--card"),
      series: read("--series").split(/\s+/), shades: read("--shades").split(/\s+/),
    };
  }

  // On paper the figures take the light colours, whatever the screen has.
  function paper() {
    return {
      ink: "#161a20", muted: "#59626e", line: "#dfe3e8", card: "#ffffff",
      series: ["#2a78d6", "#d9541e", "#14905f", "#a66f00", "#c43d78", "#5a49b8", "#0b7f8c", "#c22f2f"],
      shades: ["#f7f9fb", "#c3d9f3", "#86b1e6", "#4585d0", "#1d5cae", "#0b2f66"],
    };
  }

  function axis(colour, title, more) {
    return Object.assign({
      title: { text: title, font: { color: colour.muted, size: 13 }, standoff: 10 }, automargin: true,
      gridcolor: colour.line, linecolor: colour.line, zeroline: false, tickfont: { color: colour.muted, size: 12 },
    }, more);
  }

  function layout(colour, more) {
    return Object.assign({
      margin: { l: 8, r: 14, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour.ink, size: 13 },
      dragmode: coarse.matches ? false : "zoom",
      hoverlabel: { bgcolor: colour.card, bordercolor: colour.line, font: { color: colour.ink }, align: "left" },
    }, more);
  }

  function lines(figure, against, colour) {
    const format = figure.percent ? ".1%" : ".4~g";
    const data = figure.traces.map((trace) => ({
      type: "scatter", x: trace.x[against], y: trace.y, name: trace.name,
      mode: trace.y.length <= 40 && trace.dash === "solid" ? "lines+markers" : "lines", marker: { size: 5 }, cliponaxis: false,
      line: {
        color: colour.series[trace.color % colour.series.length], width: 2,
        dash: trace.dash === "solid" ? dashes[Math.floor(trace.color / colour.series.length) % 4] : trace.dash,
      },
      hovertemplate: "%{y:" + format + "}<extra>%{fullData.name}</extra>",
    }));
    return [data, layout(colour, {
      hovermode: "x unified", showlegend: data.length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: axis(colour, figure.axes[against], { rangemode: "tozero" }),
      yaxis: axis(colour, figure.ytitle, figure.percent ? { tickformat: ".0%" } : { rangemode: "tozero" }),
    })];
  }

  function bars(figure, colour) {
    const format = figure.percent ? ".0%" : ".4~g";
    const data = [{
      type: "bar", x: figure.x, y: figure.y, width: figure.width * 0.92,
      marker: { color: colour.series[0] }, hovertemplate: "%{x:" + format + "}: %{y}<extra></extra>",
    }];
    return [data, layout(colour, {
      showlegend: false, bargap: 0, margin: { l: 8, r: 14, t: figure.marks.length ? 24 : 8, b: 8 },
      xaxis: axis(colour, figure.xtitle, { range: figure.range, showgrid: false, tickformat: figure.percent ? ".0%" : "" }),
      yaxis: axis(colour, figure.ytitle, { rangemode: "tozero" }),
      shapes: figure.marks.map((mark) => ({
        type: "line", x0: mark.x, x1: mark.x, yref: "paper", y0: 0, y1: 1, line: { color: colour.ink, width: 1.5, dash: "dot" },
      })),
      annotations: figure.marks.map((mark) => ({
        x: mark.x, yref: "paper", y: 1, yanchor: "bottom", text: mark.text, showarrow: false, font: { size: 12 },
      })),
    })];
  }

  // The clients' sizes as bars, largest first; below each bar the mix of its labels: one column, one line a class.
  function population(figure, colour) {
    const place = figure.clients.map((_, i) => i);
    const name = (i) => "client " + figure.clients[i];
    const mixed = figure.classes.length > 0;
    const data = [{
      type: "bar", name: "Training examples", x: place, y: figure.sizes, width: 0.86, yaxis: "y2", showlegend: false,
      marker: { color: colour.series[0] }, customdata: place.map(name), hovertemplate: "%{customdata}: %{y:,} examples<extra></extra>",
    }];
    // Marks in a line of their own: a client with few examples has next to no bar that could be coloured.
    const symbols = ["circle-open", "x-thin-open", "triangle-up-open", "square-open", "diamond-open"];
    figure.marks.forEach((mark, k) => data.push({
      type: "scatter", mode: "markers", name: mark.name, x: mark.at, y: mark.at.map(() => 0), yaxis: "y3", cliponaxis: false,
      marker: { symbol: symbols[k % symbols.length], size: 7, color: colour.ink, line: { width: 1.6, color: colour.ink } },
      customdata: mark.at.map(name), hovertemplate: "%{customdata}<extra>%{fullData.name}</extra>",
    }));
    if (mixed) {
      // The root of the share, so that a hundredth can be told from nothing.
      const share = (count, i) => (figure.sizes[i] ? count / figure.sizes[i] : 0);
      const ticks = [0.01, 0.1, 0.25, 0.5, 1];
      data.push({
        type: "heatmap", x: place, y: figure.classes.map(String), zmin: 0, zmax: 1, xgap: 1, ygap: figure.classes.length > 25 ? 0 : 1,
        colorscale: colour.shades.map((shade, i, all) => [i / (all.length - 1), shade]),
        z: figure.counts.map((line) => line.map((count, i) => Math.sqrt(share(count, i)))),
        text: figure.counts.map((line) => line.map((count, i) =>
          name(i) + ": " + count + " of " + figure.sizes[i] + " (" + (100 * share(count, i)).toFixed(1) + " %)")),
        hovertemplate: "%{text}<br>class %{y}<extra></extra>",
        colorbar: {
          orientation: "h", x: 0, xanchor: "left", xpad: 0, y: 0, yanchor: "top", ypad: 26, len: 230, lenmode: "pixels", thickness: 9,
          tickvals: ticks.map(Math.sqrt), ticktext: ticks.map((tick) => 100 * tick + " %"), outlinewidth: 0,
          tickfont: { color: colour.muted, size: 11 },
        },
      });
    }
    const [marked, sized] = mixed ? [[0.63, 0.66], [figure.marks.length ? 0.69 : 0.65, 1]] : [[0, 0.08], [figure.marks.length ? 0.14 : 0, 1]];
    const look = layout(colour, {
      showlegend: figure.marks.length > 0, bargap: 0, margin: { l: 8, r: 14, t: 8, b: mixed ? 62 : 26 },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: axis(colour, "", {
        range: [-0.5, place.length - 0.5], showgrid: false, showline: false, showticklabels: false, ticks: "", automargin: false,
        anchor: mixed ? "y" : "y2",
      }),
      yaxis2: axis(colour, "Examples", { domain: sized, rangemode: "tozero", nticks: 5 }),
      yaxis3: { domain: marked, visible: false, range: [-1, 1], fixedrange: true },
      annotations: [{
        xref: "paper", yref: "paper", x: 0, y: 0, xanchor: "left", yanchor: "top", yshift: -4, showarrow: false,
        text: "Clients, largest first", font: { size: 13, color: colour.muted },
      }],
    });
    if (mixed) {
      look.yaxis = axis(colour, "Class", {
        domain: [0, 0.61], type: "category", autorange: "reversed", showgrid: false, nticks: Math.min(figure.classes.length, 12),
      });
    }
    return [data, look];
  }

  const kinds = {
    lines, bars: (figure, against, colour) => bars(figure, colour), population: (figure, against, colour) => population(figure, colour),
  };

  function draw() {
    const chosen = document.querySelector("input[name=axis]:checked");
    const against = chosen ? chosen.value : "round";
    const colour = printing ? paper() : colours();
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById("figure-" + name);
      const [data, look] = kinds[figure.kind](figure, against, colour);
      if (printing) look.width = Math.min(place.clientWidth, 640);  // what fits a page, whatever the window's width
      Plotly.react(place, data, look, { displayModeBar: false, responsive: true });
    }
  }

  for (const choice of document.querySelectorAll("input[name=axis]")) choice.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
  draw();
})();
