# frozen_string_literal: true

# A client of the deltawire gateway: chat completions as streams of typed events, which are retried and resumed after lost
# connections, and watches of models.
module Deltawire
end

require 'deltawire/client'
