// What @asyncapi/parser says of documents: `node asyncapi.mjs FILE…` prints a list for each file.
// References to files beside a document are followed; nothing is fetched.

import { Parser, fromFile } from '@asyncapi/parser';

const SEVERITIES = ['error', 'warning', 'info', 'hint'];
const parser = new Parser();
const said = [];
for (const path of process.argv.slice(2)) {
  const { document, diagnostics } = await fromFile(parser, path).parse();
  said.push({
    path,
    parsed: document !== undefined,
    diagnostics: diagnostics.map(({ code, severity, message, path }) => ({
      code, severity: SEVERITIES[severity], message, path: path.join('.'),
    })),
  });
}
console.log(JSON.stringify(said));
